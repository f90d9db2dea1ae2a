"""A small video of three steps, made, continued and compared chunk by chunk."""

from __future__ import annotations

import torch

from sneakpeek_core.frozen import FrozenCache
from sneakpeek_core.schedule import Schedule
from sneakpeek_core.settings import SamplerSettings
from sneakpeek_core.stream import Chunk, VideoStream
from tests.small import THREE, conditioner, model, steps, stream


def small_stream(
    options: SamplerSettings | None = None, schedule: Schedule | None = None, image: bool = True
) -> VideoStream:
    return stream(schedule or steps(*THREE), options, model=model(), image=image)


def continued(
    frozen: FrozenCache, more: Schedule | None = None, options: SamplerSettings | None = None
) -> VideoStream:
    options = options or frozen.settings
    return VideoStream.continue_from(frozen, model(), conditioner(), options, more)


def counted(source: VideoStream) -> list[int]:
    """Return a list that grows with every network pass of the stream."""
    passes: list[int] = []
    source.before_pass = lambda: passes.append(len(passes))
    return passes


def same(a: list[Chunk], b: list[Chunk]) -> bool:
    """Whether two lists hold the same chunks, latents bit for bit."""
    return len(a) == len(b) and all(
        (x.number, x.first, x.step, x.text) == (y.number, y.first, y.step, y.text)
        and torch.equal(x.latents_BCFHW, y.latents_BCFHW)
        for x, y in zip(a, b, strict=True)
    )
