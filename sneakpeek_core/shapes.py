"""Frame and latent-frame arithmetic of Wan 2.1 video. No torch here.

Legend of the axis letters used in tensor names everywhere in this package:

    B batch · C channels · F (latent) frames · H height · W width
    T tokens · N attention heads · D head size · L text tokens

A *latent frame* is one time slice of a video latent. The first decodes to one frame, every later
one to four; eight pixels make one latent cell, 2x2 cells make one token.
"""

from __future__ import annotations

SPATIAL = 8  # pixels per latent cell, each way
TEMPORAL = 4  # frames per latent frame after the first
PATCH = 2  # latent cells per token, each way
LATENT_CHANNELS = 16
SIZE_STEP = SPATIAL * PATCH


def frames_of(latent_frames: int) -> int:
    """Return the frames that `latent_frames` decode to, the first one alone."""
    return 1 + TEMPORAL * (latent_frames - 1) if latent_frames > 0 else 0


def latent_frames_of(frames: int) -> int:
    """Return the latent frames of a clip of `frames` = 4n+1 frames; `ValueError` for others."""
    if frames < 1 or (frames - 1) % TEMPORAL:
        below = max(1, 1 + (frames - 1) // TEMPORAL * TEMPORAL)
        raise ValueError(f"length {frames} is not 4n+1; use {below} or {below + TEMPORAL} frames")
    return 1 + (frames - 1) // TEMPORAL


def tokens_per_frame(latent_height: int, latent_width: int) -> int:
    """Return the tokens of one latent frame (odd edges are padded up to a whole token)."""
    return -(-latent_height // PATCH) * -(-latent_width // PATCH)


def check_size(width: int, height: int) -> None:
    """Raise `ValueError` unless both sides are positive multiples of 16 pixels."""
    for name, value in (("width", width), ("height", height)):
        if value < SIZE_STEP or value % SIZE_STEP:
            near = max(SIZE_STEP, round(value / SIZE_STEP) * SIZE_STEP)
            raise ValueError(f"{name} {value} is not a multiple of {SIZE_STEP}; use {near}")
