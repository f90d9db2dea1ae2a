"""Where clips come from: the toy world, or a folder of videos; as a recipe's `[data]` says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..shapes import TEMPORAL
from ..toyworld.render import render
from ..toyworld.scene import (
    FIRST_TRAINING_SEED,
    FPS,
    FRAMES_PER_STEP,
    SAME_COLOUR,
    make_scene,
)
from .latent_set import Clip
from .recipe import build, check_counts, check_shares
from .video_folder import FolderData


@dataclass(frozen=True)
class Source:
    """Clips by number, made when they are asked for.

    A clip's name stands for everything that it is made of, but for what the recipe's `[data]` says.
    """

    names: tuple[str, ...]
    clip_at: Callable[[int], Clip]


@dataclass(frozen=True, kw_only=True)
class ToyData:
    """Scenes of the toy world, rendered as they are asked for."""

    kind: Literal["toyworld"] = "toyworld"
    videos: int
    steps: int = 3
    tier: str = "tabletop"
    objects: int = 3
    open_ended: float = 0.15  # share of steps that say "somewhere else"
    same_colour: float = SAME_COLOUR  # of scenes in which only the shape tells two objects apart
    moved: int = 0  # videos begin after up to so many moves, as a long one's later steps do

    def __post_init__(self) -> None:
        check_counts(self, "videos", "steps")
        check_shares(self, "open_ended", "same_colour")
        if self.moved < 0:
            raise ValueError(f"moved {self.moved} is not allowed; use 0 moves or more")

    @property
    def fps(self) -> float:
        """Frames a second, which no recipe can change."""
        return FPS

    def clip(self, index: int) -> Clip:
        """Return a video with its steps: of a scene that no evaluation uses."""
        return self.clip_of(FIRST_TRAINING_SEED + index)

    def clip_of(self, seed: int) -> Clip:
        """Return the video of any scene."""
        moved = seed % (self.moved + 1)
        scene = make_scene(
            seed, moved + self.steps, tier=self.tier, objects=self.objects,
            open_ended=self.open_ended, same_colour=self.same_colour,
        ).after(moved)  # fmt: skip
        latent_frames = FRAMES_PER_STEP // TEMPORAL
        steps = tuple((sentence, latent_frames) for sentence in scene.sentences)
        return Clip(as_bytes(render(scene)), steps)


def data_of(table: dict[str, Any]) -> ToyData | FolderData:
    """Return a recipe's `[data]` by its `kind`; `ValueError` for what is no such table."""
    kinds = {"toyworld": ToyData, "folder": FolderData}
    kind = table.get("kind", "toyworld")
    if kind not in kinds:
        raise ValueError(f"data: kind {kind!r} must be one of {', '.join(kinds)}")
    return build(kinds[kind], table, "data")


def source_of(data: ToyData | FolderData) -> Source:
    """Return the clips that a recipe's `[data]` describes."""
    if isinstance(data, ToyData):
        return Source(tuple(f"{index:06d}" for index in range(data.videos)), data.clip)
    videos = data.read()
    return Source(tuple(video.name for video in videos), lambda index: data.clip(videos[index]))


def as_bytes(frames_FHWC: Tensor) -> Tensor:
    """Return pixels in [0, 1] as uint8."""
    return (frames_FHWC * 255).round().to(torch.uint8)
