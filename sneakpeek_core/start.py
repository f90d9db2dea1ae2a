"""Given latents that a video begins with: an encoded image, or a clip."""

from __future__ import annotations

from torch import Tensor

from .shapes import LATENT_CHANNELS, SPATIAL


def start_chunks(latents_BCFHW: Tensor, chunk: int) -> list[Tensor]:
    """Split given latents into the pieces that get a context pass each.

    Whole chunks where they fit (Self-Forcing's video extension), else the first latent frame, an
    image, is a chunk of its own.
    """
    alone = latents_BCFHW.shape[2] % chunk
    if alone == 0:
        return list(latents_BCFHW.split(chunk, dim=2))
    image, rest = latents_BCFHW[:, :, :1], latents_BCFHW[:, :, 1:]
    return [image, *(rest.split(chunk, dim=2) if rest.shape[2] else ())]


def check_start(start: Tensor, batch: int, width: int, height: int) -> None:
    """Raise `ValueError` unless latents are [batch, C, F, H, W] of a video of that many pixels."""
    expected = (batch, LATENT_CHANNELS, start.shape[2], height // SPATIAL, width // SPATIAL)
    if start.shape != expected:
        raise ValueError(
            f"the start's latents are {tuple(start.shape)}, not {expected}; resize the start to "
            f"{width}x{height}"
        )
