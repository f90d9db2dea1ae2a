"""Which latent frames one training sequence holds, and what each of them sees.

A video is laid out as the sampler would walk it: every chunk once clean (the past of later ones)
and once open (to be denoised), and for each plan its keyframes twice, as noisy *targets* that are
learned and as nearly clean *guides* that chunks see. Chunk length, window, sink and plans are drawn
anew for every sequence; what is visible, and at which distance, follows from the sampler's own
rules. Where they move the start towards a window, a chunk has a copy of it there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..guidance import FutureGuidance, targets
from ..model.parallel import Frame
from ..policy import CachePolicy
from ..schedule import Timeline
from .recipe import check_counts, check_shares

Role = Literal["clean", "open", "target", "guide", "empty"]


@dataclass(frozen=True, kw_only=True)
class LayoutRecipe:
    """How sequences differ from each other. Shares are probabilities, frames are latent frames."""

    chunks: tuple[int, ...] = (3, 3, 3, 3, 3, 1, 1, 1, 1, 2)  # one of these lengths each
    windows: tuple[int, ...] = (6, 9, 12)  # one of these, open chunk included
    windowed: float = 0.5  # share of sequences with a window; the others see all the past
    sink: float = 0.6  # share of windowed ones that keep the first frame
    guided: float = 0.65  # share of chunks that see their plan
    horizons: tuple[int, ...] = (1, 1, 2)  # keyframes of a plan; 0: none, an ordinary causal model
    reaches: tuple[int, ...] = (8, 18)  # farthest keyframe from the chunk it is planned for
    late: float = 0.25  # plans made anew in the middle of a step, per step

    def __post_init__(self) -> None:
        check_shares(self, "windowed", "sink", "guided", "late")
        if not (self.chunks and min(self.chunks) > 0):
            raise ValueError(f"chunks {self.chunks} must be lengths of at least 1; use [3, 1]")
        if min(self.windows, default=0) <= max(self.chunks):
            raise ValueError(
                f"windows {self.windows} must be longer than the longest chunk, {max(self.chunks)}"
            )


@dataclass(frozen=True, kw_only=True)
class SketchRecipe:
    """Batches of step ends alone, from which what happens is learned apart from how."""

    share: float = 0.0  # of all batches
    batch: int = 28  # videos in one
    draws: int = 3  # of the noise on each step's end
    anywhere: float = 0.0  # share of draws at any frame of a step instead of its end

    def __post_init__(self) -> None:
        check_shares(self, "share", "anywhere")
        check_counts(self, "batch", "draws")


class Place(NamedTuple):
    """One frame of the sequence. `group` numbers what shares a noise level: a chunk, a plan."""

    role: Role
    frame: int
    step: int
    group: int
    guided: bool = False
    moved_to: int | None = None  # the temporal position of a copy of the start

    @property
    def position(self) -> int:
        """The temporal position at which it is seen."""
        return self.frame if self.moved_to is None else self.moved_to


class Layout(NamedTuple):
    """A sequence: its places, and the same as the masked forward wants them."""

    places: list[Place]
    frames: list[Frame]
    kept: dict[int, frozenset[int]]  # past frames held when a chunk opens


def draw_layout(
    ends: Sequence[int], recipe: LayoutRecipe, rng: random.Random, positions: str = "absolute"
) -> Layout:
    """Lay out a video whose steps end (exclusively) at these latent frames; frame 0 is given.

    `positions` are those of the sampler's cache policy.
    """
    timeline = Timeline(tuple(ends))
    size = rng.choice(recipe.chunks)
    if rng.random() < recipe.windowed:
        sink = int(rng.random() < recipe.sink)
        window = rng.choice(recipe.windows)
        policy = CachePolicy(sink=sink, window=window, positions=positions)
    else:
        policy = CachePolicy(positions=positions)
    horizon = rng.choice(recipe.horizons)
    guidance = FutureGuidance(count=max(horizon, 1))
    reach = rng.choice(recipe.reaches)

    last = timeline.latent_frames
    chunks = [range(1), *(range(f, min(f + size, last)) for f in range(1, last, size))]
    places, frames, kept = [], [], {}
    plan, planned, copies = -1, range(0), 0
    for number, chunk in enumerate(chunks):
        first = chunk.start
        past = policy.keep(range(first), size) if first else ()
        kept[number] = frozenset(past)
        start = _start_position(policy, past, first)
        if start:
            # It saw nothing but itself, so that a copy elsewhere is the same picture, turned.
            copies += 1
            stand_in = last + copies
            places.append(Place("clean", 0, 0, 0, moved_to=start))
            frames.append(Frame("clean", stand_in, -copies))
            kept[number] = kept[number] - {0} | {stand_in}
        if number + 1 < len(chunks):  # nothing comes after the last to see it
            for frame in chunk:
                places.append(Place("clean", frame, timeline.step_of(frame), number))
                frames.append(Frame("clean", frame, number))
        if not number:
            continue
        reached = not planned or min(planned) < first
        step = timeline.step_of(first)
        share = len(chunk) / (timeline.ends[step] - timeline.start(step))  # of its step
        if horizon and (reached or rng.random() < recipe.late * share):
            found = targets(timeline, first, reach, guidance, frozenset())
            planned = [target.frame for target in found]
            for role in ("target", "guide"):
                plan += 1
                for target in found:
                    places.append(Place(role, target.frame, target.step, plan))
                    frames.append(Frame("future", target.frame, number, plan))
        guided = horizon > 0 and rng.random() < recipe.guided
        for frame in chunk:
            places.append(Place("open", frame, timeline.step_of(frame), number, guided))
            frames.append(Frame("open", frame, number, plan if guided else -1))
    return Layout(places, frames, kept)


def _start_position(policy: CachePolicy, past: Sequence[int], first: int) -> int:
    """Return where a chunk sees the start, in the numbers of the frames next to it; 0: in place."""
    if not past or past[0] != 0:
        return 0
    placed = policy.place(past, first)
    return round(placed.past[0] + first - placed.first)


def sketch_layout(ends: Sequence[int], recipe: SketchRecipe, rng: random.Random) -> Layout:
    """Lay out the start and the ends of steps alone: what happens, without how.

    Each end is a keyframe that sees the ends before it, once for every draw of its noise. This has
    a fraction of a whole video's frames, and more keyframes to learn in them. A share of draws
    is of any frame of the step instead: what is carried looks different from what lies.
    """
    timeline = Timeline(tuple(ends))
    places, frames, kept = [Place("clean", 0, 0, 0)], [Frame("clean", 0, 0)], {}
    for step, end in enumerate(timeline.ends):
        number, last = step + 1, end - 1
        kept[number] = frozenset(place.frame for place in places if place.role == "clean")
        for draw in range(recipe.draws):
            plan = step * recipe.draws + draw
            within = rng.random() < recipe.anywhere
            frame = rng.randrange(max(1, timeline.start(step)), end) if within else last
            places.append(Place("target", frame, step, plan))
            frames.append(Frame("future", frame, number, plan))
        if number < len(timeline.ends):
            places.append(Place("clean", last, step, number))
            frames.append(Frame("clean", last, number))
    return Layout(places, frames, kept)


def padded(layout: Layout, length: int) -> Layout:
    """Return the layout with empty places behind it, which see and are seen by nothing else."""
    places, frames = list(layout.places), list(layout.frames)
    chunks = 1 + max(frame.chunk for frame in frames)
    for extra in range(length - len(places)):
        places.append(Place("empty", 0, 0, -1))
        frames.append(Frame("open", 0, chunks + extra))
    return Layout(places, frames, layout.kept)
