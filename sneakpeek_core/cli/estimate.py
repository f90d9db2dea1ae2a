"""`sneakpeek estimate`: what a video will need, before anything is loaded."""

from __future__ import annotations

import argparse

from .. import estimate as sizes
from ..shapes import frames_of
from .order import order_of


def run(options: argparse.Namespace) -> int:
    """Print the estimate; say what to change when it does not fit."""
    if options.resume:
        raise ValueError("--resume has nothing to estimate; give the video's own options instead")
    order = order_of(options)
    (width, height), frames = order.size, frames_of(order.latent_frames)
    family, dtype = order.outline.preset.name, str(order.dtype).removeprefix("torch.")
    print(f"{width}x{height}, {frames} frames, {family}, {dtype} on {order.device}")
    print(sizes.estimate(order.plan, sizes.free_bytes(order.device)))
    return 0
