"""Which past latent frames stay in the cache, and at which temporal positions they are seen.

A policy is a small function and an optional hook, and positions are another; none of them knows
the storage layout, so a new policy is a new function and a row in `POLICIES`. Frames are latent
frame numbers of the video. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .schedule import is_whole

if TYPE_CHECKING:
    from torch import Tensor


class Placement(NamedTuple):
    """Temporal positions at which the kept frames and the first frame of the chunk are seen."""

    past: tuple[float, ...]
    first: float


# (settings, frames held, chunk to leave room for) -> the frames to keep, in the same order.
KeepFrames = Callable[["CachePolicy", Sequence[int], int], tuple[int, ...]]
# (kept frames, first frame of the open chunk) -> positions.
PlaceFrames = Callable[[Sequence[int], int], Placement]
# Keys (before RoPE) and values of one frame, [layers, B, S, N, D] each.
Content = tuple["Tensor", "Tensor"]
# (content of a held frame by its number, frames about to leave) -> new content of frames that
# stay. A hook reads and returns; it must not write, since it is run again after an interrupt.
OnEvict = Callable[[Callable[[int], Content], tuple[int, ...]], Mapping[int, Content]]


def sink_and_window(policy: CachePolicy, frames: Sequence[int], chunk: int) -> tuple[int, ...]:
    """Keep the first `sink` frames and the newest that fit the window beside an open chunk.

    Self-Forcing evicts when the next chunk opens; evicting when this one closes keeps the same
    frames visible and leaves less to hold in between.
    """
    if policy.window is None:
        return tuple(frames)
    newest = frames[-1] + 1 - (policy.window - chunk)
    return tuple(f for f in frames if f < policy.sink or f >= newest)


def absolute(past: Sequence[int], first: int) -> Placement:
    """Every frame at its own number: Self-Forcing's positions."""
    return Placement(tuple(float(f) for f in past), float(first))


def relative(past: Sequence[int], first: int) -> Placement:
    """Kept frames side by side from 0, the chunk behind them: positions that never grow.

    The sink moves along directly in front of the window (block-relativistic RoPE, Infinity-RoPE).
    """
    return Placement(tuple(float(i) for i in range(len(past))), float(len(past)))


class Policy(NamedTuple):
    """What stays, and what to do with that which leaves."""

    keep: KeepFrames
    on_evict: OnEvict | None = None


POLICIES: dict[str, Policy] = {"sink_window": Policy(sink_and_window)}
POSITIONS: Mapping[str, PlaceFrames] = {"absolute": absolute, "relative": relative}


@dataclass(frozen=True, kw_only=True)
class CachePolicy:
    """The past region's settings, in latent frames.

    `window` counts the newest frames with the open chunk and leaves the sink out; None keeps all.
    `policy` and `positions` name entries of `POLICIES` and `POSITIONS`. Raises `ValueError` for
    impossible numbers.
    """

    sink: int = 0
    window: int | None = None
    positions: str = "absolute"
    policy: str = "sink_window"

    def __post_init__(self) -> None:
        if not is_whole(self.sink) or self.sink < 0:
            raise ValueError(f"sink {self.sink!r} is not allowed; use 0 or more latent frames")
        if self.window is not None and not is_whole(self.window):
            raise ValueError(
                f"window {self.window!r} is not allowed; use whole latent frames, or 'all'"
            )
        for name, value, table in (
            ("policy", self.policy, POLICIES),
            ("positions", self.positions, POSITIONS),
        ):
            if not isinstance(value, str) or value not in table:
                raise ValueError(f"{name} {value!r} is unknown; use one of {', '.join(table)}")

    def check(self, chunk: int) -> None:
        """Raise `ValueError` unless a chunk of `chunk` latent frames fits the window."""
        if self.window is not None and self.window < chunk:
            raise ValueError(
                f"window {self.window} is smaller than one chunk of {chunk} latent frames; "
                f"use {2 * chunk} or more, or 'all'"
            )

    def capacity(self, latent_frames: int) -> int:
        """Return the slots needed for a video of that many latent frames, open chunk included."""
        if self.window is None:
            return latent_frames
        return min(self.sink + self.window, latent_frames)

    def keep(self, frames: Sequence[int], chunk: int) -> tuple[int, ...]:
        return POLICIES[self.policy].keep(self, frames, chunk)

    def place(self, past: Sequence[int], first: int) -> Placement:
        return POSITIONS[self.positions](past, first)
