"""Small streams for the tests of the laws: what holds however a video is made, kept or interrupted.

The laws are those of the design (section 5), a file each. Law 4, streaming decode equals
whole decode, is in test_vae.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import av

from sneakpeek_core.cache import KVCache
from sneakpeek_core.frozen import FrozenCache
from sneakpeek_core.model.initial import random_vae
from sneakpeek_core.noise import NoiseSource
from sneakpeek_core.sampler import Rollout
from sneakpeek_core.schedule import Schedule
from sneakpeek_core.settings import SamplerSettings
from sneakpeek_core.stream import VideoStream
from sneakpeek_core.vae.wan import WanVAE
from tests.small import CELLS, conditioner, goal, model, stream

FPS = 16.0
LONG = ("[2s] lift it", "[2s] turn it", "[2s] put it down")  # 25 latent frames, 13 chunks


@cache
def vae() -> WanVAE:
    return random_vae(dim=8, seed=0).eval().requires_grad_(False)


def small_stream(
    options: SamplerSettings | None = None, schedule: Schedule | None = None, image: bool = True
) -> VideoStream:
    return stream(schedule, options, model=model(), image=image)


def continued(
    frozen: FrozenCache, options: SamplerSettings | None = None, more: Schedule | None = None
) -> VideoStream:
    options = options or frozen.settings
    return VideoStream.continue_from(frozen, model(), conditioner(), options, more)


def rollout_of(source: VideoStream, noise: NoiseSource | None = None) -> Rollout:
    """A sampler with the settings of a stream, to be driven by hand."""
    caches = [KVCache(source.cache_spec) for _ in range(2 if source.settings.cfg > 1 else 1)]
    return Rollout(source.model.denoiser, caches, source.settings, (CELLS, CELLS), noise=noise)


def with_goals(schedule: Schedule, *indices: int) -> Schedule:
    return replace(
        schedule,
        steps=tuple(
            replace(step, goal=goal(i)) if i in indices else step
            for i, step in enumerate(schedule.steps)
        ),
    )


def decodable_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))
