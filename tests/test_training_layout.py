"""Training sequences: what they hold, and that each frame sees what the sampler would show it."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
import torch

from sneakpeek_core.guidance import FutureGuidance
from sneakpeek_core.model.parallel import Frame, frame_mask
from sneakpeek_core.policy import CachePolicy
from sneakpeek_core.training.layout import (
    Layout,
    LayoutRecipe,
    SketchRecipe,
    draw_layout,
    padded,
    sketch_layout,
)
from tests.small import settings, steps, stream

ENDS = (7, 13, 19)
SEEDS = range(60)


def layout_of(seed: int, ends: tuple[int, ...] = ENDS, **changes) -> Layout:
    return draw_layout(ends, LayoutRecipe(**changes), random.Random(seed))


def visible(
    query: Frame, key: Frame, kept: Mapping[int, frozenset[int]], *, joint: bool = False
) -> bool:
    """The table of the design, section 5, written out for one pair of frames."""
    if key.kind == "clean":
        own = query.kind == "clean" and query.chunk == key.chunk
        held = kept.get(query.chunk, frozenset())
        return own or (key.chunk < query.chunk and key.frame in held)
    if query.kind == "clean":
        return False
    same_plan = query.plan == key.plan != -1
    if key.kind == "open":
        own = query.chunk == key.chunk and query.plan == key.plan
        return own and (query.kind == "open" or (joint and same_plan))
    return same_plan


@pytest.mark.parametrize("joint", [False, True])
def test_mask_is_the_design_s_table(joint: bool):
    """The mask made for all pairs at once says what the table says for each."""
    for seed in range(12):
        _, frames, kept = layout_of(seed)
        expected = [[visible(q, k, kept, joint=joint) for k in frames] for q in frames]
        assert frame_mask(frames, kept, joint=joint).tolist() == expected


def test_every_frame_is_learned_once_and_the_past_is_there_for_it():
    """Frames 1.. are open once; all but the last chunk are clean once, frame 0 among them."""
    for seed in SEEDS:
        places = layout_of(seed).places
        assert sorted(p.frame for p in places if p.role == "open") == list(range(1, ENDS[-1]))
        clean = [p.frame for p in places if p.role == "clean"]
        last = max(p.group for p in places if p.role == "open")
        first_of_last = min(p.frame for p in places if p.role == "open" and p.group == last)
        assert clean == list(range(first_of_last))


def test_keyframes_come_in_pairs_ahead_of_the_chunk_they_guide():
    """A plan's targets and guides are the same frames, and none that a guided chunk has passed."""
    for seed in SEEDS:
        places, frames, _ = layout_of(seed, late=0.6)
        plans: dict[int, list[int]] = {}
        for place, frame in zip(places, frames, strict=True):
            if frame.kind == "future":
                plans.setdefault(frame.plan, []).append(place.frame)
        roles = {p.group: p.role for p in places if p.role in ("target", "guide")}
        for plan in (p for p in plans if roles[p] == "target"):
            assert roles[plan + 1] == "guide" and plans[plan] == plans[plan + 1]
        for place, frame in zip(places, frames, strict=True):
            if place.role == "open" and place.guided:
                chunk = [p.frame for p in places if p.role == "open" and p.group == place.group]
                assert roles[frame.plan] == "guide" and min(plans[frame.plan]) >= chunk[0]
            elif place.role == "open":
                assert frame.plan == -1


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2])
def test_plans_are_made_when_and_where_the_sampler_makes_them(chunk: int, count: int):
    """Chunk by chunk, the keyframes that a guided chunk sees are those of a stream of the steps."""
    made = stream(
        steps("[1.5s] a", "[1.5s] b", "[1.5s] c"),
        settings(
            chunk=chunk, span=19, policy=CachePolicy(), guidance=FutureGuidance(count=count),
            sigmas=(1.0, 0.0),
        ),
    )  # fmt: skip
    sampled = []
    for _ in made:
        rollout = made.rollout
        if rollout is not None:  # the start picture is not sampled
            seen = [key.frame for key in rollout.caches[0].future]
            sampled.append((rollout.planned_at, seen))
    layout = layout_of(
        0, chunks=(chunk,), windowed=0.0, guided=1.0, horizons=(count,), reaches=(18,), late=0.0
    )
    plans: dict[int, tuple[int, list[int]]] = {}
    for frame in layout.frames:
        if frame.kind == "future":
            plans.setdefault(frame.plan, (frame.chunk, []))[1].append(frame.frame)
    opened = {f.chunk: f.plan for f in layout.frames if f.kind == "open"}
    assert [plans[plan] for _, plan in sorted(opened.items())] == sampled


def test_without_a_horizon_it_is_an_ordinary_causal_model():
    """No keyframes, and nothing guided: what a fair comparison trains."""
    for seed in SEEDS:
        places = layout_of(seed, horizons=(0,)).places
        assert {place.role for place in places} == {"clean", "open"}
        assert not any(place.guided for place in places)


def test_sketches_show_the_ends_of_steps_and_nothing_between():
    """Each end is denoised as often as asked, each draw on its own, from the ends before it."""
    places, frames, kept = sketch_layout(ENDS, SketchRecipe(draws=2), random.Random(0))
    mask = frame_mask(frames, kept)
    ends = [end - 1 for end in ENDS]
    assert [p.frame for p in places if p.role == "clean"] == [0, *ends[:-1]]
    assert [p.frame for p in places if p.role == "target"] == [e for e in ends for _ in range(2)]
    for row, place in enumerate(places):
        seen = {(places[i].role, places[i].frame) for i in mask[row].nonzero().flatten().tolist()}
        before = {("clean", frame) for frame in (0, *ends) if frame < place.frame}
        assert seen == before | {(place.role, place.frame)}
        if place.role == "target":
            assert sum(mask[row]) == len(before) + 1  # the other draw is not among them
    levels = {place.group for place in places if place.role == "target"}
    assert len(levels) == 2 * len(ENDS)  # each draw has a noise level of its own


def test_sketches_show_frames_within_steps_when_asked():
    """A share of draws is of any frame of its step but the start; what it sees stays the same."""
    starts = [1, *ENDS[:-1]]
    found = {step: set() for step in range(len(ENDS))}
    for seed in range(40):
        recipe = SketchRecipe(draws=3, anywhere=1.0)
        places, frames, kept = sketch_layout(ENDS, recipe, random.Random(seed))
        mask = frame_mask(frames, kept)
        for row, place in enumerate(places):
            if place.role == "target":
                found[place.step].add(place.frame)
                assert sum(mask[row]) == place.step + 2  # the start, the ends before, itself
    assert list(found.values()) == [set(range(a, b)) for a, b in zip(starts, ENDS, strict=True)]
    half = SketchRecipe(draws=200, anywhere=0.5)
    places = sketch_layout(ENDS[:1], half, random.Random(1)).places
    ends = sum(place.frame == ENDS[0] - 1 for place in places if place.role == "target")
    assert 90 <= ends <= 150  # half of them, and what falls on the end by chance
    with pytest.raises(ValueError, match="anywhere 2"):
        SketchRecipe(anywhere=2)


def test_windows_keep_what_the_policy_keeps():
    """A chunk of a windowed sequence sees the newest frames that fit beside it, and the sink."""
    for seed in SEEDS:
        places, frames, kept = layout_of(
            seed, chunks=(3,), windows=(6,), windowed=1.0, sink=1.0, guided=0.0
        )
        mask = frame_mask(frames, kept)
        for row, (place, frame) in enumerate(zip(places, frames, strict=True)):
            if place.role != "open":
                continue
            seen = [
                p.frame for p, v in zip(places, mask[row], strict=True) if v and p.role == "clean"
            ]
            first = min(p.frame for p in places if p.role == "open" and p.group == frame.chunk)
            newest = range(max(first - 3, 0), first)
            assert seen == sorted({0, *newest})


def test_texts_are_those_of_the_frames_steps():
    """Every place is told the step that its latent frame lies in; a start picture the first."""
    for place in layout_of(3, chunks=(1,)).places:
        assert place.step == (0 if place.frame < 7 else 1 if place.frame < 13 else 2)


def test_padding_sees_and_is_seen_by_nothing():
    """Empty places only see themselves."""
    layout = layout_of(5)
    count = len(layout.places)
    longer = padded(layout, count + 3)
    mask = frame_mask(longer.frames, longer.kept)
    assert torch.equal(mask[count:, count:], torch.eye(3, dtype=torch.bool))
    assert not mask[:count, count:].any() and not mask[count:, :count].any()
    assert torch.equal(mask[:count, :count], frame_mask(layout.frames, layout.kept))
    assert all(place.role == "empty" for place in longer.places[count:])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"guided": 1.5}, "guided 1.5"),
        ({"chunks": ()}, "chunks"),
        ({"chunks": (6,), "windows": (6,)}, "windows"),
    ],
)
def test_bad_numbers_are_refused_by_name(changes: dict, named: str):
    """A recipe's layout says which number is wrong."""
    with pytest.raises(ValueError, match=named):
        LayoutRecipe(**changes)
