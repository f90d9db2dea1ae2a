"""How well a video follows its scene, from pixels alone; the scene says what should be seen.

All numbers are per video, higher is better but for errors and drift. Step ends are the frames
24 k: the hand is home there, so they are the same whatever path it took.

Legend: F frames, H height, W width, C channels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import torch
from torch import Tensor

from .detect import Blob, find, find_hand, foreign
from .motion import APPROACH, CARRY, GRASP, moments
from .render import render_moments
from .scene import (
    APART,
    COLOURS,
    FRAMES_PER_STEP,
    IN_BOX,
    OPEN_ENDED,
    SHAPES,
    Move,
    Point,
    Scene,
    Thing,
    target_of,
)

REACHED_PX = 5.0  # an object this close to where it should be is there
STILL_PX = 4.0  # one that moved less was left alone
SMALLEST, LARGEST = 0.5, 1.6  # of its first area, for an object that persists
ON_PATH_PX = 9.0  # the hand this close to where a straight path has it: paths bend by 5
GONE_PX = 64.0  # the position error of an object that is not there
CARRIED = range(1 + APPROACH + GRASP, 1 + APPROACH + GRASP + CARRY)  # frames of a step


@dataclass(frozen=True, kw_only=True)
class StepScore:
    """One step. `moved_error_px` is how far its object ends from the truth."""

    success: bool
    moved_error_px: float
    psnr_db: float


@dataclass(frozen=True, kw_only=True)
class VideoScore:
    """One video.

    `step_success`: share of steps after which the named object lies within 5 px of where the step
    sends it (from where it was found before), every other object is within 4 px of where it was,
    and nothing appeared or vanished. `all_steps_right`: 1 if every step succeeded and every object
    is within 5 px of the truth at every step end. `persistence`: share of step ends at which there
    are as many objects of each colour as the scene has, each of 0.5 to 1.6 times its first area,
    and nothing foreign beside them. `shape`: share of objects at step ends that have their shape.
    `position_error_px`: mean distance to the truth at step ends (64 for an object that is gone).
    `hand_path`: share of frames in which the hand is where it should be, and during the carry the
    object is too. `psnr_db`: of step ends, mean; `psnr_drift_db`: the first step's less the last
    step's.
    """

    steps: tuple[StepScore, ...]
    step_success: float
    all_steps_right: float
    persistence: float
    shape: float
    position_error_px: float
    hand_path: float
    psnr_db: float
    psnr_drift_db: float


def score(scene: Scene, frames_FHWC: Tensor) -> VideoScore:
    """Score a video, pixels in [0, 1], of at least the scene's frames; more are not looked at."""
    frames = frames_FHWC[: scene.frames]
    if len(frames) < scene.frames:
        raise ValueError(
            f"a video of {len(frames)} frames is shorter than its scene, {scene.frames}"
        )
    ends = frames[::FRAMES_PER_STEP]
    blobs = find(ends)
    strange = foreign(ends, _bare(scene), blobs)
    located = [locate(scene.things, on_frame) for on_frame in blobs]
    truth = scene.positions()
    squared = (ends - render_moments(scene, moments(scene)[::FRAMES_PER_STEP])).square()
    psnr = [-10 * math.log10(max(float(error.mean()), 1e-10)) for error in squared[1:]]

    steps, errors = [], []
    for number, move in enumerate(scene.moves):
        before, after = located[number], located[number + 1]
        same = _counted(blobs[number]) == _counted(blobs[number + 1])
        same &= strange[number] or not strange[number + 1]
        off = [_distance(blob, at) for blob, at in zip(after, truth[number + 1], strict=True)]
        goal = _goal(scene, move, before[move.thing])
        left_alone = all(
            _moved(old, new) < STILL_PX
            for i, (old, new) in enumerate(zip(before, after, strict=True))
            if i != move.thing
        )
        there = _distance(after[move.thing], goal) < REACHED_PX
        steps.append(
            StepScore(
                success=there and left_alone and same,
                moved_error_px=min(off[move.thing], GONE_PX),
                psnr_db=psnr[number],
            )
        )
        errors.append(off)
    return VideoScore(
        steps=tuple(steps),
        step_success=fmean(step.success for step in steps),
        all_steps_right=float(
            all(step.success for step in steps) and max(map(max, errors)) < REACHED_PX
        ),
        persistence=_persistence(scene.things, blobs, located, strange),
        shape=fmean(
            blob is not None and blob.shape == thing.shape
            for found in located[1:]
            for blob, thing in zip(found, scene.things, strict=True)
        ),
        position_error_px=fmean(min(error, GONE_PX) for off in errors for error in off),
        hand_path=_hand_path(scene, frames),
        psnr_db=fmean(psnr),
        psnr_drift_db=psnr[0] - psnr[-1],
    )


def locate(things: Sequence[Thing], blobs: Sequence[Blob]) -> list[Blob | None]:
    """Return which blob each thing is: by colour, and where things share one by shape as well."""
    found: list[Blob | None] = [None] * len(things)
    for colour in COLOURS:
        wanted = [i for i, thing in enumerate(things) if thing.colour == colour]
        there = sorted((b for b in blobs if b.colour == colour), key=lambda b: -b.area)
        if len(wanted) == 1 and there:
            found[wanted[0]] = there[0]
        elif len(wanted) > 1:
            shapes = [things[i].shape for i in wanted]
            for i, blob in zip(wanted, _assigned(shapes, there), strict=True):
                found[i] = blob
    return found


def shape_accuracy(scenes: Sequence[Scene], videos: Sequence[Tensor]) -> tuple[float, float]:
    """Return the share of shapes that are recognised: on standing objects, and on carried ones.

    `videos` are FHWC in [0, 1] of the scenes as they should be (a VAE's reconstructions): standing
    objects are looked at on the first picture and at step ends, carried ones in every frame of the
    carry. An object is the blob of its colour that is nearest to where it must be.
    """
    standing, carried = [], []
    for scene, frames in zip(scenes, videos, strict=True):
        path = moments(scene)
        for number, (moment, blobs) in enumerate(
            zip(path, _found_where_needed(frames), strict=True)
        ):
            phase = (number - 1) % FRAMES_PER_STEP + 1 if number else 0
            step = (number - 1) // FRAMES_PER_STEP
            if number % FRAMES_PER_STEP == 0:
                standing += [
                    _recognised(thing, at, blobs)
                    for thing, at in zip(scene.things, moment.at, strict=True)
                ]
            elif phase in CARRIED:
                thing = scene.moves[step].thing
                carried.append(_recognised(scene.things[thing], moment.at[thing], blobs))
    return fmean(standing), fmean(carried)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over videos and its standard error."""
    return fmean(values), stdev(values) / math.sqrt(len(values))


def paired(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Return the mean of a - b over the same videos, and its standard error."""
    return mean_and_error([x - y for x, y in zip(a, b, strict=True)])


def _goal(scene: Scene, move: Move, before: Blob | None) -> Point:
    if before is None or move.place == OPEN_ENDED:
        return move.target
    return scene.box if move.place == IN_BOX else target_of(move.place, before.at, scene.box)


def _counted(blobs: Sequence[Blob]) -> Counter[str]:
    return Counter(blob.colour for blob in blobs)


def _distance(blob: Blob | None, point: Point) -> float:
    return math.inf if blob is None else math.dist(blob.at, point)


def _moved(before: Blob | None, after: Blob | None) -> float:
    """Return how far an object moved; one that was gone before can only stay gone."""
    if before is None or after is None:
        return 0.0 if before is after else math.inf
    return math.dist(before.at, after.at)


def _assigned(shapes: Sequence[str], blobs: Sequence[Blob]) -> list[Blob | None]:
    """Give each shape a blob so that the shapes fit best; None where blobs run out."""
    best: tuple[float, list[Blob | None]] = (math.inf, [None] * len(shapes))

    def place(index: int, left: list[Blob], cost: float, chosen: list[Blob | None]) -> None:
        nonlocal best
        if index == len(shapes):
            best = min(best, (cost, chosen), key=lambda pair: pair[0])
            return
        kind = SHAPES.index(shapes[index])
        for blob in left:
            rest = [other for other in left if other is not blob]
            place(index + 1, rest, cost + blob.misfit[kind], [*chosen, blob])
        if len(left) < len(shapes) - index:  # somebody goes without
            place(index + 1, left, cost, [*chosen, None])

    place(0, list(blobs), 0.0, [])
    return best[1]


def _persistence(
    things: Sequence[Thing],
    blobs: list[list[Blob]],
    located: list[list[Blob | None]],
    strange: list[bool],
) -> float:
    expected = Counter(thing.colour for thing in things)

    def whole(number: int) -> bool:
        if _counted(blobs[number]) != expected or strange[number]:
            return False
        for first, now in zip(located[0], located[number], strict=True):
            if first is None or now is None:
                return False
            if not SMALLEST <= now.area / first.area <= LARGEST:
                return False
        return True

    return fmean(whole(number) for number in range(1, len(blobs)))


def _bare(scene: Scene) -> Tensor:
    """Return the scene's step ends without its objects: table, box, and the hand at home."""
    still = replace(scene, things=(), start=(), moves=())
    return render_moments(still, moments(still)).expand(1 + len(scene.moves), -1, -1, -1)


def _hand_path(scene: Scene, frames_FHWC: Tensor) -> float:
    """Share of the frames that show the hand at work, or at home at step ends.

    Where it should be is measured on the scene rendered with straight paths, so that what hides
    part of the hand (the edge, what it carries) hides it there too.
    """
    straight = moments(scene, bend=0.0)
    expected = find_hand(render_moments(scene, straight))
    seen = find_hand(frames_FHWC)
    carries = [n for n in range(len(straight)) if n and (n - 1) % FRAMES_PER_STEP + 1 in CARRIED]
    carried = [scene.moves[(n - 1) // FRAMES_PER_STEP].thing for n in carries]
    colours = [scene.things[thing].colour for thing in carried]
    objects = dict(zip(carries, find(frames_FHWC[carries], colours), strict=True))
    good = 0
    for number in range(1, len(straight)):
        hand, should = seen[number], expected[number]
        right = hand is not None and should is not None and math.dist(hand, should) < ON_PATH_PX
        if right and number in objects:
            thing = scene.moves[(number - 1) // FRAMES_PER_STEP].thing
            colour, at = scene.things[thing].colour, straight[number].at[thing]
            away = min((math.dist(blob.at, at) for blob in objects[number]), default=math.inf)
            # two of a colour are one blob while one is carried past the other
            there = sum(other.colour == colour for other in scene.things)
            right = away < (APART if len(objects[number]) < there else ON_PATH_PX)
        good += right
    return good / (len(straight) - 1)


def _found_where_needed(frames_FHWC: Tensor) -> list[list[Blob]]:
    """Return the objects on step ends and in carries; nothing elsewhere."""
    needed = [
        n
        for n in range(len(frames_FHWC))
        if n % FRAMES_PER_STEP == 0 or (n - 1) % FRAMES_PER_STEP + 1 in CARRIED
    ]
    found: list[list[Blob]] = [[] for _ in frames_FHWC]
    for number, blobs in zip(needed, find(frames_FHWC[torch.tensor(needed)]), strict=True):
        found[number] = blobs
    return found


def _recognised(thing: Thing, at: Point, blobs: Sequence[Blob]) -> bool:
    own = [blob for blob in blobs if blob.colour == thing.colour]
    if not own:
        return False
    nearest = min(own, key=lambda blob: math.dist(blob.at, at))
    return nearest.shape == thing.shape and math.dist(nearest.at, at) < REACHED_PX
