"""Encoded videos, and stretches of them that are short enough to train on.

Legend: C channels, F latent frames, H height, W width, K steps whose end is there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Video(Protocol):
    """Latents CFHW, step-end pictures encoded alone KCHW, and (text, frames) of each step."""

    @property
    def latents(self) -> Tensor: ...

    @property
    def ends(self) -> Tensor: ...

    @property
    def steps(self) -> Sequence[tuple[str, int]]: ...


@dataclass(frozen=True)
class Cut:
    """A stretch of a video, itself a `Video`. Its last step may go on behind it."""

    latents: Tensor
    ends: Tensor
    steps: Sequence[tuple[str, int]]


def cut(video: Video, span: int, rng: random.Random) -> Video:
    """Return at most `span` latent frames of a longer video; a shorter one as it is.

    A stretch begins as a stream does: with a picture encoded alone, which there is of the video's
    start and of every step's end. Only a step longer than the span is also cut in its middle.
    """
    frames = video.latents.shape[1]
    if frames <= span:
        return video
    ends = ends_of(video)
    begins = [0, *(end - 1 for end in ends[:-1])]
    for begin, end in zip(tuple(begins), ends, strict=True):
        begins += range(begin + 1, end - span + 1)
    first = rng.choice(begins)
    last = min(first + span, frames)
    latents = video.latents[:, first:last].clone()
    steps, kept = [], []
    for index, ((text, count), end) in enumerate(zip(video.steps, ends, strict=True)):
        inside = min(end, last) - max(end - count, first + 1)
        if inside > 0:
            steps.append((text, inside))
            if end <= last:
                kept.append(index)
        elif end - 1 == first:
            latents[:, 0] = video.ends[index]
    return Cut(latents, video.ends[kept], steps)


def ends_of(video: Video) -> list[int]:
    """Return where steps end: the latent frame behind each one's last."""
    ends = [1]
    for _, frames in video.steps:
        ends.append(ends[-1] + frames)
    return ends[1:]
