"""Where the hand and the objects are in every frame: the moves of a scene as smooth paths.

A step: the hand comes from home, grasps, carries, lets go, and is home again in the step's last
frame. Paths bend at random; where a step ends does not depend on them. No torch here.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from .scene import FRAMES_PER_STEP, Point, Scene

HOME: Point = (32.0, 56.0)
APPROACH, GRASP, CARRY, RELEASE, RETURN = 8, 1, 8, 1, 6  # frames of each phase
BEND = 5.0  # most pixels that a path is off its straight line
assert APPROACH + GRASP + CARRY + RELEASE + RETURN == FRAMES_PER_STEP


@dataclass(frozen=True)
class Moment:
    """One frame: the point that the hand grips, whether it is closed, what it carries."""

    hand: Point
    closed: bool
    carried: int | None
    at: tuple[Point, ...]


def moments(scene: Scene, *, bend: float = BEND) -> list[Moment]:
    """Return every frame of a scene, the first picture included. `bend` 0: paths are straight."""
    rng = random.Random(f"paths {scene.seed}")
    at = list(scene.start)
    frames = [Moment(HOME, False, None, tuple(at))]
    for move in scene.moves:
        source, target = at[move.thing], move.target
        for hand in _path(rng.uniform(-bend, bend), HOME, source, APPROACH):
            frames.append(Moment(hand, False, None, tuple(at)))
        frames += [Moment(source, True, move.thing, tuple(at))] * GRASP
        for hand in _path(rng.uniform(-bend, bend), source, target, CARRY):
            at[move.thing] = hand
            frames.append(Moment(hand, True, move.thing, tuple(at)))
        frames += [Moment(target, False, None, tuple(at))] * RELEASE
        for hand in _path(rng.uniform(-bend, bend), target, HOME, RETURN):
            frames.append(Moment(hand, False, None, tuple(at)))
    return frames


def _path(bend: float, start: Point, end: Point, frames: int) -> list[Point]:
    """Return `frames` points after `start`, the last is `end`: a bow with slow ends."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = math.hypot(dx, dy) or 1.0
    points = []
    for frame in range(1, frames + 1):
        t = frame / frames
        eased = (t + t * t * (3 - 2 * t)) / 2  # half way between steady and smooth
        bow = bend * 4 * eased * (1 - eased) / length
        points.append((start[0] + eased * dx - bow * dy, start[1] + eased * dy + bow * dx))
    points[-1] = end
    return points
