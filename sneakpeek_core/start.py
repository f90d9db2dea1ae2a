"""Given latents that a video begins with: an encoded image, or a clip."""

from __future__ import annotations

import torch
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


def check_start(start: Tensor, batch: int, width: int, height: int, latent_frames: int) -> None:
    """Raise `ValueError` unless latents are [batch, C, F, H, W] that a video can begin with.

    `width` and `height` are the video's pixels, `latent_frames` its length.
    """
    frames = start.shape[2] if start.dim() == 5 else 1
    expected = (batch, LATENT_CHANNELS, frames, height // SPATIAL, width // SPATIAL)
    if start.shape != expected:
        raise ValueError(
            f"the start's latents are {tuple(start.shape)}, not {expected}; resize the start to "
            f"{width}x{height}"
        )
    if not 1 <= frames <= latent_frames:
        raise ValueError(
            f"the start has {frames} latent frames, the video {latent_frames}; give it 1 to "
            f"{latent_frames}, or longer steps"
        )
    if not start.is_floating_point() or not torch.isfinite(start).all():
        raise ValueError("the start's latents are not all finite fractions; encode it again")
