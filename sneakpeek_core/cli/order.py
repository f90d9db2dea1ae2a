"""What the options ask for, as far as file headers tell: checked whole before any loading."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..assembly import Files, Outline, outline_of, vae_dtype
from ..estimate import Plan
from ..frozen import FrozenCache, continued_schedule
from ..schedule import Schedule, Timeline
from ..settings import SamplerSettings
from .options import (
    BIG_DIM,
    DTYPES,
    FULL_SIZE,
    SMALL_SIZE,
    device_of,
    fps_of,
    size_of,
)
from .sampling import settings_of
from .steps import schedule_of, start_of

FILES = ("model", "vae", "text_encoder", "lora")


@dataclass(frozen=True, kw_only=True)
class Order:
    """A video as it was asked for. `size` is (width, height) in pixels."""

    files: Files
    outline: Outline
    device: torch.device
    dtype: torch.dtype
    size: tuple[int, int]
    fps: float
    settings: SamplerSettings
    schedule: Schedule | None  # None: the cache's own goes on
    cache: FrozenCache | None
    start: Tensor | None  # a picture [1, H, W, 3] in [0, 1]
    latent_frames: int

    @property
    def plan(self) -> Plan:
        """Return the sizes that an estimate is made from."""
        return Plan(
            config=self.outline.config,
            parameters=self.outline.parameters,
            vae_dim=self.outline.vae_dim,
            width=self.size[0],
            height=self.size[1],
            latent_frames=self.latent_frames,
            settings=self.settings,
            dtype=self.dtype,
            vae_dtype=vae_dtype(self.dtype, self.device),
        )


def order_of(options: argparse.Namespace) -> Order:
    """Return what the options ask for; `ValueError` for what cannot be."""
    files = files_of(options)
    _check_combinations(options)
    device = device_of(options.device)
    cache = FrozenCache.load(options.continue_from) if options.continue_from else None
    schedule = schedule_of(options) if options.steps or not cache else None
    start = start_of(options)
    outline = outline_of(files)
    settings = settings_of(
        options, outline.preset, goals=bool(options.goal), base=cache.settings if cache else None
    )
    if start is not None and settings.policy.sink < 1:  # a start image is never evicted
        settings = replace(settings, policy=replace(settings.policy, sink=1))
    _check_negative(options, settings, cache)
    default = FULL_SIZE if outline.config.dim >= BIG_DIM else SMALL_SIZE
    size = size_of(options.size, cache.size if cache else default)
    fps = fps_of(options.fps, cache.fps if cache else outline.preset.fps)
    whole = schedule
    if cache:
        # The weights are compared once they are there.
        cache.check(fingerprint=cache.fingerprint, size=size, fps=fps, settings=settings)
        whole = continued_schedule(cache, schedule)
    assert whole is not None
    timeline = Timeline.of(whole, fps)
    settings.check_length(timeline.latent_frames)
    return Order(
        files=files,
        outline=outline,
        device=device,
        dtype=outline.dtype(DTYPES.get(options.dtype)),
        size=size,
        fps=fps,
        settings=settings,
        schedule=schedule,
        cache=cache,
        start=start,
        latent_frames=timeline.latent_frames,
    )


def files_of(options: argparse.Namespace) -> Files:
    """Return the model's files; `ValueError` when one is not there."""
    return Files.of(**{name: getattr(options, name) for name in FILES})


def _check_combinations(options: argparse.Namespace) -> None:
    if options.continue_from and options.image:
        raise ValueError("--image and --continue-from were given; a cache goes on from its own end")
    if options.goal and options.continue_from and not options.steps:
        raise ValueError("--goal needs the --steps it belongs to; give the file of steps")
    if options.watch and not options.steps:
        raise ValueError("--watch needs a file of steps to look at; give it with --steps")


def _check_negative(
    options: argparse.Namespace, settings: SamplerSettings, cache: FrozenCache | None
) -> None:
    known = cache is not None and cache.conditioning.negative is not None
    if settings.cfg > 1 and options.negative is None and not known:
        raise ValueError(
            f"cfg {settings.cfg:g} needs a text to keep away from; add --negative, or --cfg 1"
        )
    if settings.cfg == 1 and options.negative is not None:
        raise ValueError("--negative does nothing with cfg 1; add --cfg 5, or leave it out")
