"""Frames to latents and back, chunk by chunk or a whole clip, through the VAE's two steps.

Frames are BFHWC in [0, 1], latents BCFHW in model space, both float32 on the VAE's device. The
first latent frame of a clip stands for one frame, every later one for four. How a clip is cut into
calls changes nothing but rounding.

Legend: B batch, F frames or latent frames, H height, W width, C channels.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor

from ..shapes import LATENT_CHANNELS, SPATIAL, TEMPORAL, frames_of, latent_frames_of
from .wan import State, WanVAE

LATENT_FRAMES_PER_STEP = 3  # bounds the memory of one step; the usual chunk is one step


class StreamingDecoder:
    """A clip's decoder: hand it latents as they come. Rows of a batch are clips of their own.

    `state` is a value: read it to remember a position, set it back to return there. A call that
    raises leaves it as it was, so the same call can be made again.
    """

    def __init__(self, vae: WanVAE, *, latent_frames_per_step: int = LATENT_FRAMES_PER_STEP):
        self.vae = vae
        self.latent_frames_per_step = latent_frames_per_step
        self.state: State = None

    @torch.no_grad()  # a state with a graph would keep every chunk before it alive
    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Return the next frames BFHWC in [0, 1]; `ValueError` if the latents do not go on."""
        frames_BFHWC, state = _decode(
            self.vae, latents_BCFHW, self.state, self.latent_frames_per_step
        )
        self.state = state
        return frames_BFHWC

    def reset(self) -> None:
        """Begin a new clip, of any size."""
        self.state = None


class StreamingEncoder:
    """A clip's encoder, with the same promises as `StreamingDecoder`."""

    def __init__(self, vae: WanVAE, *, latent_frames_per_step: int = LATENT_FRAMES_PER_STEP):
        self.vae = vae
        self.latent_frames_per_step = latent_frames_per_step
        self.state: State = None

    @torch.no_grad()
    def encode(self, frames_BFHWC: Tensor) -> Tensor:
        """Return the next latents (means) of frames in [0, 1]: 4n+1 frames at first, then 4n.

        `ValueError` for other lengths, sides that are no multiples of 8, or another size than
        that of the frames before.
        """
        (mean_BCFHW, _), state = _encode(
            self.vae, frames_BFHWC, self.state, self.latent_frames_per_step
        )
        self.state = state
        return mean_BCFHW

    def reset(self) -> None:
        """Begin a new clip, of any size."""
        self.state = None


def decode_video(
    vae: WanVAE,
    latents_BCFHW: Tensor,
    *,
    latent_frames_per_step: int = LATENT_FRAMES_PER_STEP,
    clamp: bool = True,
) -> Tensor:
    """Return a whole clip's frames BFHWC in [0, 1]. Differentiable.

    `clamp=False` is for losses: values outside the range stay outside and keep their gradient.
    """
    return _decode(vae, latents_BCFHW, None, latent_frames_per_step, clamp)[0]


def encode_video(
    vae: WanVAE, frames_BFHWC: Tensor, *, latent_frames_per_step: int = LATENT_FRAMES_PER_STEP
) -> Tensor:
    """Return a whole clip's latents BCFHW from 4n+1 frames in [0, 1]. Differentiable."""
    return _encode(vae, frames_BFHWC, None, latent_frames_per_step)[0][0]


def posterior(
    vae: WanVAE, frames_BFHWC: Tensor, *, latent_frames_per_step: int = LATENT_FRAMES_PER_STEP
) -> tuple[Tensor, Tensor]:
    """Return mean and log variance, each BCFHW in model space, of a clip. Differentiable."""
    return _encode(vae, frames_BFHWC, None, latent_frames_per_step)[0]


def encode_image(vae: WanVAE, image_BHWC: Tensor) -> Tensor:
    """Return the latents BCFHW, F = 1, of an image in [0, 1] encoded alone. Differentiable."""
    return encode_video(vae, image_BHWC.unsqueeze(1))


def _decode(
    vae: WanVAE, latents_BCFHW: Tensor, state: State, per_step: int, clamp: bool = True
) -> tuple[Tensor, State]:
    if latents_BCFHW.ndim != 5 or latents_BCFHW.shape[1] != LATENT_CHANNELS:
        raise ValueError(
            f"latents of shape {tuple(latents_BCFHW.shape)} are not (batch, {LATENT_CHANNELS}, "
            "latent frames, height, width); use latents of a Wan 2.1 model"
        )
    if not latents_BCFHW.shape[2]:
        raise ValueError("there are 0 latent frames to decode; give at least 1")
    _check_goes_on("latent", latents_BCFHW, state)
    parts = []
    for piece_BCFHW in latents_BCFHW.split(per_step, dim=2):
        video_BCFHW, state = vae.decode_step(piece_BCFHW, state)
        frames_BFHWC = rearrange(video_BCFHW, "b c f h w -> b f h w c").float() / 2 + 0.5
        parts.append(frames_BFHWC.clamp(0, 1) if clamp else frames_BFHWC)
    return _joined(parts, 1), state


def _encode(
    vae: WanVAE, frames_BFHWC: Tensor, state: State, per_step: int
) -> tuple[tuple[Tensor, Tensor], State]:
    _check_frames(frames_BFHWC, started=state is not None)
    video_BCFHW = rearrange(frames_BFHWC, "b f h w c -> b c f h w")
    _check_goes_on("frame", video_BCFHW, state)
    stride = per_step * TEMPORAL
    first = frames_of(per_step) if state is None else stride
    means, logvars = [], []
    cuts = list(range(first, video_BCFHW.shape[2], stride))
    for piece_BCFHW in video_BCFHW.tensor_split(cuts, dim=2):
        (mean_BCFHW, logvar_BCFHW), state = vae.encode_step(piece_BCFHW * 2 - 1, state)
        means.append(mean_BCFHW)
        logvars.append(logvar_BCFHW)
    return (_joined(means, 2), _joined(logvars, 2)), state


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _check_frames(frames_BFHWC: Tensor, *, started: bool) -> None:
    if frames_BFHWC.ndim != 5 or frames_BFHWC.shape[4] != 3:
        raise ValueError(
            f"frames of shape {tuple(frames_BFHWC.shape)} are not (batch, frames, height, width, "
            "3); give RGB without alpha"
        )
    _, length, height, width, _ = frames_BFHWC.shape
    for name, value in (("width", width), ("height", height)):
        if value < SPATIAL or value % SPATIAL:
            near = max(SPATIAL, round(value / SPATIAL) * SPATIAL)
            raise ValueError(f"{name} {value} is not a multiple of {SPATIAL}; use {near}")
    if not started:
        latent_frames_of(length)
    elif length < TEMPORAL or length % TEMPORAL:
        below = max(TEMPORAL, length // TEMPORAL * TEMPORAL)
        raise ValueError(
            f"{length} frames cannot go on a clip: after its first call the encoder takes "
            f"multiples of {TEMPORAL}; give {below} or {below + TEMPORAL}, or reset() it"
        )


def _check_goes_on(what: str, x_BCFHW: Tensor, state: State) -> None:
    """Raise `ValueError` unless batch and size are those of the clip so far."""
    if state is None:
        return
    # the first convolution's history has the input's own batch and size
    (batch, _, _, height, width), now = state[0].shape, x_BCFHW.shape
    if (batch, height, width) != (now[0], now[3], now[4]):
        raise ValueError(
            f"{what} size {now[4]}x{now[3]}, batch {now[0]}, does not go on a clip of "
            f"{width}x{height}, batch {batch}; reset() before a clip of another size"
        )


@lru_cache
def decoder_state_bytes(
    dim: int, latent_height: int, latent_width: int, *, dtype_bytes: int = 4, batch: int = 1
) -> int:
    """Return the bytes of a `StreamingDecoder.state`: constant from the first call on.

    Found by one step on the meta device, which has the shapes and allocates nothing.
    """
    with torch.device("meta"), torch.no_grad():
        latents_BCFHW = torch.empty(batch, LATENT_CHANNELS, 1, latent_height, latent_width)
        _, state = WanVAE(dim).decode_step(latents_BCFHW, None)
    return dtype_bytes * sum(x.numel() for x in state or ())


def decode_peak_bytes(
    dim: int,
    latent_height: int,
    latent_width: int,
    *,
    latent_frames: int = LATENT_FRAMES_PER_STEP,
    dtype_bytes: int = 4,
    batch: int = 1,
) -> int:
    """Estimate the most bytes that one decode step holds in tensors, weights not counted.

    Derived from the last upsampler, at full size: its input (2 dim channels at a quarter of the
    size), the enlarged copy (2 dim) and the result (dim), beside the states before and after.
    Workspace of the convolution library is not in it.
    """
    pixels = batch * TEMPORAL * latent_frames * (SPATIAL * latent_height) * (SPATIAL * latent_width)
    activations = pixels * dim * dtype_bytes * 7 // 2
    state = decoder_state_bytes(
        dim, latent_height, latent_width, dtype_bytes=dtype_bytes, batch=batch
    )
    return activations + 2 * state
