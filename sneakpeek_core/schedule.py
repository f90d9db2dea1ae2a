"""Steps, and which latent frame belongs to which of them. No torch here.

A *schedule* is the list of steps as the user wrote it; a *timeline* is the same at a frame rate,
in latent frames. Latent frame 0 is the start image (or the first frame of a video without one) and
belongs to the first step; step i covers the latent frames [start, end) with
`end = 1 + round(cumulative seconds * frames per second / 4)`, so a schedule of n seconds gives
1 + 4k frames, the length that a Wan video has.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from .shapes import TEMPORAL, frames_of

MAX_STEPS = 1000
MAX_TEXT = 10_000  # characters of one step
MAX_SECONDS = 24 * 3600.0  # of a whole schedule
MAX_FPS = 1000
_BRACKET = re.compile(r"\[([^\]]*)\](.*)", re.DOTALL)
_SECONDS = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*s?", re.IGNORECASE)


def is_whole(value: object) -> bool:
    """Say whether a value is an `int`: files and callers also bring 2.0 and True."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Say whether a value is a finite `int` or `float`."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step. `embeds` (ready-made text embeddings) and `goal` (a picture of how it ends) are
    opaque here: the schedule carries them, it never looks inside."""

    text: str
    seconds: float
    embeds: Any = field(default=None, compare=False, repr=False)
    goal: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Schedule:
    """Steps in order. `base` goes in front of every step's text."""

    steps: tuple[Step, ...]
    base: str = ""

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError(
                "the schedule has no steps; write one a line, as in [4s] whisk the eggs"
            )
        if len(self.steps) > MAX_STEPS:
            raise ValueError(
                f"the schedule has {len(self.steps)} steps; at most {MAX_STEPS} are allowed: "
                "split it and continue from a saved cache"
            )
        for number, step in enumerate(self.steps, 1):
            _check_step(step, f"step {number}")
        if self.seconds > MAX_SECONDS:
            raise ValueError(
                f"the schedule lasts {self.seconds:g} s; at most {MAX_SECONDS:g} s are allowed: "
                "split it and continue from a saved cache"
            )

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    def prompt(self, index: int) -> str:
        """Return the whole text of a step: the base in front of its own."""
        return f"{self.base} {self.steps[index].text}".strip()

    def extended(self, more: Schedule) -> Schedule:
        """Return this schedule with the steps of `more` behind it; their base goes into them."""
        if more.base == self.base:
            return replace(self, steps=self.steps + more.steps)
        own = tuple(replace(s, text=self.prompt(i)) for i, s in enumerate(self.steps))
        new = tuple(replace(s, text=more.prompt(i)) for i, s in enumerate(more.steps))
        return Schedule(own + new)

    def to_text(self) -> str:
        """Return the schedule in the format that `parse_steps` reads, one line a step."""
        lines = [f"base: {_one_line(self.base)}"] if self.base else []
        steps = (f"[{_plain(s.seconds)}s] {_one_line(s.text)}" for s in self.steps)
        return "\n".join([*lines, *steps])


def _plain(seconds: float) -> str:
    """Return the shortest decimal that reads back as the same number, without an exponent."""
    return format(Decimal(repr(float(seconds))).normalize(), "f")


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines())


def parse_steps(text: str, *, default_seconds: float | None = None) -> Schedule:
    """Read one step per line, `[4s] whisk the eggs`; `base:` and `#` comment lines are optional.

    Raises `ValueError` naming the line. A line without a duration takes `default_seconds` when
    one is given.
    """
    steps: list[Step] = []
    base = ""
    for number, raw in enumerate(text.lstrip("\ufeff").splitlines(), 1):
        line, where = raw.strip(), f"line {number}"
        if not line or line.startswith("#"):
            continue
        if line.lower().startswith("base:"):
            if base:
                raise ValueError(f"{where}: a second base: line; keep one")
            base = line[5:].strip()
            if not base:
                raise ValueError(f"{where}: base: is empty; write its text or remove the line")
            continue
        steps.append(_parse_line(line, where, default_seconds))
    return Schedule(tuple(steps), base)


def _parse_line(line: str, where: str, default_seconds: float | None) -> Step:
    example = "write a duration in seconds in front, as in [4s] whisk the eggs"
    if not line.startswith("["):
        if default_seconds is None:
            raise ValueError(f"{where}: {line[:40]!r} has no duration; {example}")
        step = Step(text=line, seconds=default_seconds)
    else:
        match = _BRACKET.fullmatch(line)
        if match is None:
            raise ValueError(f"{where}: the bracket in {line[:40]!r} is not closed; {example}")
        duration = _SECONDS.fullmatch(match[1].strip())
        if duration is None:
            raise ValueError(f"{where}: [{match[1][:40]}] is not a duration; {example}")
        step = Step(text=match[2].strip(), seconds=float(duration[1]))
    _check_step(step, where)
    return step


def _check_step(step: Step, where: str) -> None:
    if not math.isfinite(step.seconds) or step.seconds <= 0:
        raise ValueError(f"{where}: {step.seconds:g} seconds is not a duration; use more than 0")
    if not step.text.strip() and step.embeds is None:
        raise ValueError(f"{where}: the step has no text; say what happens in it")
    if len(step.text) > MAX_TEXT:
        raise ValueError(
            f"{where}: the text has {len(step.text)} characters; at most {MAX_TEXT} are allowed"
        )


@dataclass(frozen=True)
class Timeline:
    """Step boundaries in latent frames: step i covers [ends[i - 1], ends[i]), the first from 0."""

    ends: tuple[int, ...]

    @classmethod
    def of(cls, schedule: Schedule, fps: float) -> Timeline:
        """Place the steps at `fps` frames per second. `ValueError` for a step too short to show."""
        if not is_number(fps) or not 0 < fps <= MAX_FPS:
            raise ValueError(f"fps {fps!r} is not allowed; use more than 0, up to {MAX_FPS}")
        ends, seconds = [], 0.0
        for number, step in enumerate(schedule.steps, 1):
            seconds += step.seconds
            # Half a latent frame always rounds up (Python's round() goes to the even one), or a
            # step of exactly one could vanish; the last digits of a sum must not decide.
            end = 1 + math.floor(seconds * fps / TEMPORAL + 0.5 + 1e-6)
            if end <= (ends[-1] if ends else 1):
                raise ValueError(
                    f"step {number} lasts {step.seconds:g} s, less than one latent frame; "
                    f"use at least {TEMPORAL / fps:g} s at {fps:g} frames per second"
                )
            ends.append(end)
        return cls(tuple(ends))

    @property
    def latent_frames(self) -> int:
        return self.ends[-1]

    @property
    def frames(self) -> int:
        return frames_of(self.latent_frames)

    def start(self, step: int) -> int:
        return self.ends[step - 1] if step else 0

    def step_of(self, latent_frame: int) -> int:
        """Return the step a latent frame lies in; frames behind the end lie in the last."""
        return min(bisect_right(self.ends, latent_frame), len(self.ends) - 1)

    def frame_range(self, step: int) -> tuple[int, int]:
        """Return the decoded frames [first, end) of a step."""
        return frames_of(self.start(step)), frames_of(self.ends[step])


def check_edit(old: Schedule, new: Schedule, fps: float, made: int) -> Timeline:
    """Return the timeline of `new` if it may replace `old` after `made` latent frames.

    Steps that have ended must stay as they are; the running step keeps its start and what has
    been made of it, and may change its text and its end; coming steps are free. Raises
    `ValueError` naming the first step that may not change.
    """
    before, after = Timeline.of(old, fps), Timeline.of(new, fps)
    running = bisect_right(before.ends, made)  # one behind the last when all is made
    for index in range(running):
        same = (
            index < len(new.steps)
            and old.prompt(index) == new.prompt(index)
            and old.steps[index].embeds is new.steps[index].embeds
            and before.ends[index] == after.ends[index]
        )
        if not same:
            raise ValueError(
                f"step {index + 1} has been generated and cannot change any more; "
                f"edit step {running + 1} or later"
            )
    made_seconds = (made - 1) * TEMPORAL / fps
    if after.latent_frames <= made:
        raise ValueError(
            f"the edited schedule ends at {(after.latent_frames - 1) * TEMPORAL / fps:g} s, but "
            f"{made_seconds:g} s have been generated; make it longer"
        )
    if after.ends[running] < made:
        end = (after.ends[running] - 1) * TEMPORAL / fps
        raise ValueError(
            f"step {running + 1} would end at {end:g} s, but {made_seconds:g} s have been "
            "generated; let it last longer"
        )
    return after
