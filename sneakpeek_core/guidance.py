"""Where keyframes go: the future region's settings and the frames it plans for. No torch here.

SneakPeek's abstract says that a causal model anticipates *future keyframes*; where they lie, how
many there are and how they are refreshed is this project's reconstruction, so each choice is a
named setting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .schedule import Timeline, is_number, is_whole

MODES = ("planned", "joint", "given")
PLACES = ("step_end", "every")
MAX_STRENGTH = 4.0


@dataclass(frozen=True, kw_only=True)
class FutureGuidance:
    """Settings of the future region.

    `mode`: *planned* denoises keyframes before the chunk and keeps them until one is reached;
    *joint* denoises them together with every chunk; *given* uses goal images only.
    `strength` multiplies the attention weight of future keys (a log-bias on their logits): 1 is
    the model's own, 0 is off. `first_passes` limits guidance to the first denoising passes of a
    chunk. `refresh` replans after that many chunks even if nothing changed (0: never).
    `context_sigma` is the noise level at which predicted keyframes are shown to the chunk.
    """

    mode: str = "planned"
    place: str = "step_end"
    every: int = 6  # latent frames between keyframes when place is "every"
    count: int = 2  # keyframes ahead: the end of the running step and of the next
    plan_passes: int | None = None  # denoising passes of a plan; None: the chunk's own sigmas
    strength: float = 1.0
    context_sigma: float = 0.0
    first_passes: int | None = None
    refresh: int = 0

    def __post_init__(self) -> None:
        checks = (
            (self.mode in MODES, "guidance", self.mode, f"use one of {', '.join(MODES)}"),
            (self.place in PLACES, "keyframes", self.place, f"use one of {', '.join(PLACES)}"),
            (_at_least(1, self.every), "every", self.every, "use 1 or more latent frames"),
            (
                _at_least(1, self.count) and self.count <= 8,
                "horizon", self.count, "use 1 to 8 keyframes",
            ),
            (
                self.plan_passes is None or _at_least(1, self.plan_passes),
                "plan passes", self.plan_passes, "use 1 or more",
            ),
            (
                is_number(self.strength) and 0 <= self.strength <= MAX_STRENGTH,
                "strength", self.strength, f"use 0 (off) to {MAX_STRENGTH:g}, 1 is neutral",
            ),
            (
                is_number(self.context_sigma) and 0 <= self.context_sigma < 1,
                "context sigma", self.context_sigma, "use 0 or more, below 1",
            ),
            (
                self.first_passes is None or _at_least(1, self.first_passes),
                "first passes", self.first_passes, "use 1 or more, or leave it out for all",
            ),
            (
                _at_least(0, self.refresh),
                "refresh", self.refresh, "use 0 (only when needed) or more chunks",
            ),
        )  # fmt: skip
        for good, name, value, fix in checks:
            if not good:
                raise ValueError(f"{name} {value!r} is not allowed; {fix}")


def _at_least(least: int, value: int) -> bool:
    return is_whole(value) and value >= least


class Target(NamedTuple):
    """A latent frame to have a keyframe for. A waypoint stands in for one beyond the span."""

    frame: int
    step: int
    waypoint: bool = False


def targets(
    timeline: Timeline, first: int, reach: int, guidance: FutureGuidance, goals: frozenset[int]
) -> tuple[Target, ...]:
    """Return the keyframes to have in sight of a chunk that starts at latent frame `first`.

    `reach` is the farthest offset from `first` that keeps keyframe and oldest past frame within
    the trained span: outside it a keyframe decays and drags the video along, so a target beyond
    becomes a waypoint at the last frame inside, and moves on when that is reached. A keyframe
    counts as reached when the chunk that holds its frame is finished. `goals` are the steps that
    end in a given picture.
    """
    limit = min(first + reach, timeline.latent_frames - 1)
    if limit < first:
        return ()
    found = {
        end - 1: Target(end - 1, step)
        for step, end in enumerate(timeline.ends)
        if step in goals and first <= end - 1 <= limit
    }
    if guidance.mode != "given":
        for frame in _wanted(timeline, first, guidance):
            inside = min(frame, limit)
            found.setdefault(inside, Target(inside, timeline.step_of(inside), frame > limit))
            if frame >= limit:
                break
    nearest = sorted(found.values())[: guidance.count]
    return tuple(nearest)


def _wanted(timeline: Timeline, first: int, guidance: FutureGuidance) -> list[int]:
    """Latent frames the setting asks for, nearest first, wherever they lie."""
    if guidance.place == "step_end":
        step = timeline.step_of(first)
        return [end - 1 for end in timeline.ends[step : step + guidance.count]]
    start = -(-first // guidance.every) * guidance.every or guidance.every
    last = timeline.latent_frames - 1
    grid = range(start, start + guidance.count * guidance.every, guidance.every)
    return [min(frame, last) for frame in grid]
