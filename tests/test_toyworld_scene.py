"""Scenes of the toy world: legal, the same everywhere, and told in the schedule's own format."""

from __future__ import annotations

import itertools
import math

import pytest

from sneakpeek_core.schedule import Timeline, parse_steps
from sneakpeek_core.toyworld.motion import HOME, moments
from sneakpeek_core.toyworld.scene import (
    APART,
    APART_FROM_BOX,
    FPS,
    FRAMES_PER_STEP,
    IN_BOX,
    LEAST_MOVE,
    OPEN_ENDED,
    PLACES,
    Scene,
    make_scene,
    other_move,
    target_of,
)

SEEDS = range(200)


def scenes(steps: int = 8, **options) -> list[Scene]:
    return [make_scene(seed, steps, **options) for seed in SEEDS]


def test_a_seed_is_a_scene():
    """The same seed gives the same scene, another seed another one."""
    assert scenes() == scenes()
    assert len({scene.start for scene in scenes()}) == len(SEEDS)


def test_scenes_stay_what_they_are():
    """Published numbers and the shipped example are about these scenes: a change must be meant."""
    scene = make_scene(1, 4)
    assert scene.sentences == (
        "put the red ball in the box",
        "move the cyan square to the centre",
        "move the red ball to the left",
        "put the cyan square in the box",
    )


@pytest.mark.parametrize("objects", [2, 3, 4])
def test_nothing_overlaps_and_every_move_is_seen(objects: int):
    """Objects stay apart, keep off the box unless put there, and move far enough, never twice."""
    for scene in scenes(objects=objects, open_ended=0.2):
        for at in scene.positions():
            for i, point in enumerate(at):
                assert all(math.dist(point, other) >= APART for other in at[:i])
                assert math.dist(point, scene.box) >= APART_FROM_BOX or point == scene.box
        for before, move in zip(scene.positions(), scene.moves, strict=False):
            assert math.dist(before[move.thing], move.target) >= LEAST_MOVE
        things = [move.thing for move in scene.moves]
        assert all(a != b for a, b in itertools.pairwise(things))


def test_moves_go_where_their_sentence_says():
    """A target is what the place means from where the object lay; only one says nothing."""
    for scene in scenes(open_ended=0.3):
        for before, move in zip(scene.positions(), scene.moves, strict=False):
            if move.place != OPEN_ENDED:
                assert move.target == target_of(move.place, before[move.thing], scene.box)
    with pytest.raises(ValueError, match=OPEN_ENDED):
        target_of(OPEN_ENDED, (1.0, 2.0), (3.0, 4.0))


def test_steps_are_the_schedule_s_own_text():
    """Parsed, they are as many steps of six latent frames as the scene has."""
    for scene in scenes()[:20]:
        schedule = parse_steps(scene.steps_text)
        assert tuple(step.text for step in schedule.steps) == scene.sentences
        assert Timeline.of(schedule, FPS).ends == tuple(7 + 6 * i for i in range(8))
        assert Timeline.of(schedule, FPS).frames == scene.frames


def test_every_sentence_names_one_object_and_shapes_are_needed():
    """No two objects are alike; in about a third of the scenes only the shape tells two apart."""
    shared = 0
    for scene in scenes():
        assert len(set(scene.things)) == len(scene.things)
        shared += len({thing.colour for thing in scene.things}) < len(scene.things)
    assert 0.2 < shared / len(SEEDS) < 0.4


def test_every_place_and_object_has_its_share():
    """No place is rare, and each of three objects moves about equally often."""
    moves = [move for scene in scenes() for move in scene.moves]
    for place in PLACES:
        assert sum(move.place == place for move in moves) > 0.02 * len(moves)
    for thing in range(3):
        assert 0.28 < sum(move.thing == thing for move in moves) / len(moves) < 0.39


def test_open_ended_steps_come_in_the_share_asked_for():
    """None by default; all with a share of 1."""
    assert not any(m.place == OPEN_ENDED for scene in scenes() for m in scene.moves)
    every = [m.place for scene in scenes(2, open_ended=1.0) for m in scene.moves]
    assert sum(place == OPEN_ENDED for place in every) > 0.98 * len(every)


def test_another_move_differs_and_is_possible():
    """What an edit puts in a step's place names another object and another place, and is legal."""
    for scene in scenes(3)[:60]:
        move = other_move(scene, 1)
        if move is None:
            continue
        assert move.thing != scene.moves[1].thing and move.place != scene.moves[1].place
        at = scene.positions()[1]
        assert move.target == target_of(move.place, at[move.thing], scene.box)
        others = [point for i, point in enumerate(at) if i != move.thing]
        assert all(math.dist(move.target, other) >= APART for other in others)


def test_the_hand_is_home_at_step_ends_and_carries_in_between():
    """Every step: home, grasp, carry, let go, home; objects move only while they are carried."""
    for scene in scenes(3)[:40]:
        path = moments(scene)
        assert len(path) == scene.frames
        for end, at in zip(path[::FRAMES_PER_STEP], scene.positions(), strict=True):
            assert end.hand == HOME and not end.closed and end.carried is None
            assert end.at == at
        for before, now in itertools.pairwise(path):
            moved = [i for i in range(3) if before.at[i] != now.at[i]]
            assert moved in ([], [now.carried])
            if now.carried is not None:
                assert now.closed and now.hand == now.at[now.carried]


def test_paths_bend_but_step_ends_do_not_depend_on_it():
    """Straight and bent paths differ in between and agree at step ends."""
    scene = make_scene(3, 2)
    bent, straight = moments(scene), moments(scene, bend=0.0)
    assert bent != straight
    assert bent[::FRAMES_PER_STEP] == straight[::FRAMES_PER_STEP]
    assert all(math.dist(a.hand, b.hand) <= 5.0 + 1e-6 for a, b in zip(bent, straight, strict=True))


def test_what_there_is_no_room_for_is_refused():
    """Bad numbers are named."""
    with pytest.raises(ValueError, match="tier 'kitchen'"):
        make_scene(0, 2, tier="kitchen")
    with pytest.raises(ValueError, match="objects 9"):
        make_scene(0, 2, objects=9)
    with pytest.raises(ValueError, match="steps 0"):
        make_scene(0, 0)


def test_box_place_is_the_box():
    """What is put in the box lies in its middle."""
    assert target_of(IN_BOX, (1.0, 2.0), (30.0, 31.0)) == (30.0, 31.0)
