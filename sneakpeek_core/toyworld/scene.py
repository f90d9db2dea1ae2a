"""The tabletop: objects, a box, a hand, and the sentences that move them. No torch here.

A scene is made from a seed and knows where everything is after every step: the truth that a video
is scored against. Coordinates are pixels (x to the right, y down) of a 64x64 picture.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

SIZE = 64  # pixels, both ways
FPS = 16.0
FRAMES_PER_STEP = 24  # 6 latent frames
STEP_SECONDS = FRAMES_PER_STEP / FPS

COLOURS = ("red", "blue", "green", "yellow", "purple", "cyan")
SHAPES = ("ball", "square", "triangle")
TIERS = ("tabletop",)
FIRST_TRAINING_SEED = 1_000_000  # scenes below are never trained on

LEFT, RIGHT, TOP, BOTTOM = 10.0, 54.0, 10.0, 44.0  # where objects go, and the edges of the table
CENTRE = (32.0, 27.0)
BOX_SIDE = 20.0  # outside
APART = 15.0  # least distance between two objects
APART_FROM_BOX = 18.0
LEAST_MOVE = 11.0
SAME_COLOUR = 0.3  # share of scenes in which only the shape tells two objects apart
OPEN_ENDED = "somewhere else"  # a place that the sentence does not say

Point = tuple[float, float]

_AXIS_TARGETS: dict[str, Callable[[Point], Point]] = {
    "to the left": lambda at: (LEFT, at[1]),
    "to the right": lambda at: (RIGHT, at[1]),
    "to the top": lambda at: (at[0], TOP),
    "to the bottom": lambda at: (at[0], BOTTOM),
    "to the centre": lambda at: CENTRE,
}
IN_BOX = "in the box"
PLACES = (IN_BOX, *_AXIS_TARGETS)


@dataclass(frozen=True)
class Thing:
    """An object on the table."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Move:
    """One step: which object (an index into the scene's) goes to which place, and where that is."""

    thing: int
    place: str
    target: Point

    def sentence(self, things: tuple[Thing, ...]) -> str:
        """Return what the model is told."""
        verb = "put" if self.place == IN_BOX else "move"
        return f"{verb} the {things[self.thing]} {self.place}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A start and the moves that follow. `start[i]` is where `things[i]` lies at first."""

    seed: int
    things: tuple[Thing, ...]
    start: tuple[Point, ...]
    box: Point
    moves: tuple[Move, ...]

    @property
    def frames(self) -> int:
        """Frames of the whole video: the first picture and 24 a step."""
        return 1 + FRAMES_PER_STEP * len(self.moves)

    @property
    def sentences(self) -> tuple[str, ...]:
        """What each step says."""
        return tuple(move.sentence(self.things) for move in self.moves)

    @property
    def steps_text(self) -> str:
        """The steps in the schedule's own format."""
        return "".join(f"[{STEP_SECONDS:g}s] {sentence}\n" for sentence in self.sentences)

    def positions(self) -> list[tuple[Point, ...]]:
        """Return where every object lies: at first, then after each step."""
        at = [self.start]
        for move in self.moves:
            now = list(at[-1])
            now[move.thing] = move.target
            at.append(tuple(now))
        return at

    def after(self, moves: int) -> Scene:
        """Return what is left of the scene once the first of its moves are made."""
        return replace(self, start=self.positions()[moves], moves=self.moves[moves:])


def target_of(place: str, at: Point, box: Point) -> Point:
    """Return where an object that lies at `at` goes. `ValueError` for a place that says nothing."""
    if place == IN_BOX:
        return box
    if place not in _AXIS_TARGETS:
        raise ValueError(f"place {place!r} is none of {', '.join(PLACES)}")
    return _AXIS_TARGETS[place](at)


def make_scene(
    seed: int,
    steps: int,
    *,
    tier: str = "tabletop",
    objects: int = 3,
    open_ended: float = 0.0,
    same_colour: float = SAME_COLOUR,
) -> Scene:
    """Return the scene of a seed: the same on every machine.

    `open_ended` is the share of steps that say "somewhere else": the place is then drawn at random
    and nothing but a picture can tell it. `same_colour` is the chance that two objects have one
    colour. `ValueError` for sizes that the table has no room for.
    """
    if tier not in TIERS:
        raise ValueError(f"tier {tier!r} is unknown; use {' or '.join(TIERS)}")
    if not 2 <= objects <= 5:
        raise ValueError(f"objects {objects} is not between 2 and 5; use 3")
    if steps < 1:
        raise ValueError(f"steps {steps} must be at least 1")
    rng = random.Random(f"sneakpeek {tier} {seed}")
    while True:
        things = _draw_things(rng, objects, same_colour)
        box, start = _draw_places(rng, objects)
        scene = Scene(seed=seed, things=things, start=start, box=box, moves=())
        moves = _draw_moves(rng, scene, steps, open_ended)
        if moves is not None:
            return replace(scene, moves=moves)


def possible_moves(things: int, at: tuple[Point, ...], box: Point, last: int | None) -> list[Move]:
    """Return every move whose place is free and far enough; never the same object twice running."""
    return [
        Move(thing, place, target)
        for thing in range(things)
        if thing != last
        for place in PLACES
        if _free(target := target_of(place, at[thing], box), thing, at, box, place == IN_BOX)
    ]


def other_move(scene: Scene, step: int) -> Move | None:
    """Return a move that `step` could have been instead: of another object, to another place.

    None when the table allows none.
    """
    at = scene.positions()[step]
    was = scene.moves[step]
    last = scene.moves[step - 1].thing if step else None
    found = [
        move
        for move in possible_moves(len(scene.things), at, scene.box, last)
        if move.place != was.place and move.thing != was.thing
    ]
    return random.Random(f"other {scene.seed} {step}").choice(found) if found else None


def _draw_things(rng: random.Random, count: int, same_colour: float) -> tuple[Thing, ...]:
    colours = rng.sample(COLOURS, count)
    shapes = [rng.choice(SHAPES) for _ in range(count)]
    if rng.random() < same_colour:
        colours[1] = colours[0]
        shapes[:2] = rng.sample(SHAPES, 2)
    things = [Thing(*pair) for pair in zip(colours, shapes, strict=True)]
    rng.shuffle(things)
    return tuple(things)


def _draw_places(rng: random.Random, count: int) -> tuple[Point, tuple[Point, ...]]:
    half = BOX_SIDE / 2
    while True:
        box = (rng.uniform(half + 1, SIZE - half - 1), rng.uniform(half + 1, BOTTOM - 2))
        at: list[Point] = []
        for _ in range(40 * count):
            place = (rng.uniform(LEFT, RIGHT), rng.uniform(TOP, BOTTOM))
            if _apart(place, at, box):
                at.append(place)
            if len(at) == count:
                return box, tuple(at)


def _draw_moves(
    rng: random.Random, scene: Scene, steps: int, open_ended: float
) -> tuple[Move, ...] | None:
    """Draw moves one by one; None when the table is locked before the last."""
    at, moves = list(scene.start), []
    for _ in range(steps):
        last = moves[-1].thing if moves else None
        found = possible_moves(len(at), tuple(at), scene.box, last)
        if not found:
            return None
        # Object first, then place: otherwise the one with most room would move most.
        thing = rng.choice(sorted({move.thing for move in found}))
        move = rng.choice([move for move in found if move.thing == thing])
        if rng.random() < open_ended:
            anywhere = list(_free_points(rng, thing, tuple(at), scene.box))
            if anywhere:
                move = Move(thing, OPEN_ENDED, anywhere[0])
        at[move.thing] = move.target
        moves.append(move)
    return tuple(moves)


def _free_points(
    rng: random.Random, thing: int, at: tuple[Point, ...], box: Point
) -> Iterator[Point]:
    for _ in range(100):
        point = (rng.uniform(LEFT, RIGHT), rng.uniform(TOP, BOTTOM))
        if _free(point, thing, at, box, False):
            yield point


def _free(target: Point, thing: int, at: tuple[Point, ...], box: Point, into_box: bool) -> bool:
    others = [point for i, point in enumerate(at) if i != thing]
    if math.dist(target, at[thing]) < LEAST_MOVE:
        return False
    return _apart(target, others, None if into_box else box)


def _apart(point: Point, others: list[Point], box: Point | None) -> bool:
    if box is not None and math.dist(point, box) < APART_FROM_BOX:
        return False
    return all(math.dist(point, other) >= APART for other in others)
