"""Where keyframes go, and which settings of guidance, cache and sampler are refused."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from sneakpeek_core.guidance import FutureGuidance, Target, targets
from sneakpeek_core.policy import CachePolicy
from sneakpeek_core.schedule import Timeline
from sneakpeek_core.settings import SamplerSettings

NONE: frozenset[int] = frozenset()
LINE = Timeline((5, 9, 13, 30))
STEP_END = FutureGuidance(place="step_end", count=2)
EVERY = FutureGuidance(place="every", every=6, count=3)


def frames(found: tuple[Target, ...]) -> list[int]:
    return [target.frame for target in found]


# -- targets ---------------------------------------------------------------------------------------


def test_step_ends():
    """The last latent frame of the running step and of the next, each with its step."""
    assert targets(LINE, 0, 20, STEP_END, NONE) == (Target(4, 0), Target(8, 1))
    assert targets(LINE, 5, 20, STEP_END, NONE) == (Target(8, 1), Target(12, 2))


def test_a_chunk_across_a_boundary_keeps_its_first_steps_end():
    """A chunk that straddles a boundary still has the end it crosses in sight, until it is
    made: frame 4 for a chunk from 4 on, no more for one from 5 on."""
    assert targets(LINE, 3, 20, STEP_END, NONE) == (Target(4, 0), Target(8, 1))
    assert targets(LINE, 4, 20, STEP_END, NONE) == (Target(4, 0), Target(8, 1))
    assert 4 not in frames(targets(LINE, 5, 20, STEP_END, NONE))


def test_count_limits_how_far_ahead():
    """`count` is the number of keyframes in sight; fewer steps give fewer."""
    for count, expected in ((1, [4]), (2, [4, 8]), (3, [4, 8, 12]), (8, [4, 8, 12, 29])):
        assert frames(targets(LINE, 1, 99, replace(STEP_END, count=count), NONE)) == expected


def test_a_step_end_beyond_the_reach_is_a_waypoint():
    """A target beyond becomes one waypoint at the last frame inside, told the text it lies in."""
    assert targets(LINE, 6, 5, STEP_END, NONE) == (Target(8, 1), Target(11, 2, True))
    assert targets(LINE, 14, 10, STEP_END, NONE) == (Target(24, 3, True),)
    assert targets(LINE, 5, 2, STEP_END, NONE) == (Target(7, 1, True),)  # and nothing behind it


def test_a_step_end_at_the_reach_is_no_waypoint():
    """Exactly at the reach is inside: the keyframe is the real one."""
    assert targets(LINE, 5, 3, STEP_END, NONE) == (Target(8, 1),)


def test_every_n():
    """Keyframes on a grid of every n latent frames, beginning with the one at or ahead."""
    assert frames(targets(LINE, 0, 20, EVERY, NONE)) == [6, 12, 18]  # 0 is the start itself
    assert frames(targets(LINE, 1, 20, EVERY, NONE)) == [6, 12, 18]
    assert frames(targets(LINE, 6, 20, EVERY, NONE)) == [6, 12, 18]  # not reached before it is made
    assert frames(targets(LINE, 7, 20, EVERY, NONE)) == [12, 18, 24]
    assert targets(LINE, 7, 8, EVERY, NONE) == (Target(12, 2), Target(15, 3, True))


@pytest.mark.parametrize("guidance", [STEP_END, EVERY], ids=["step_end", "every"])
def test_the_end_of_the_video(guidance: FutureGuidance):
    """No keyframe lies behind the last latent frame; there it is no waypoint; then none at all."""
    assert targets(LINE, 26, 20, guidance, NONE) == (Target(29, 3),)
    assert targets(LINE, 29, 20, guidance, NONE) == (Target(29, 3),)
    assert targets(LINE, 30, 20, guidance, NONE) == ()


def test_nothing_within_reach():
    """A reach of less than nothing (history fills the span) gives no keyframes."""
    assert targets(LINE, 10, -1, STEP_END, NONE) == ()
    assert targets(LINE, 10, -1, STEP_END, frozenset({2})) == ()


def test_given_mode_uses_goals_alone():
    """Goal images only, those within reach, never a waypoint."""
    given = FutureGuidance(mode="given", count=2)
    goals = frozenset({1, 3})
    assert targets(LINE, 5, 20, given, goals) == (Target(8, 1),)
    assert targets(LINE, 5, 24, given, goals) == (Target(8, 1), Target(29, 3))
    assert targets(LINE, 9, 10, given, goals) == ()


def test_goals_beside_predicted_keyframes():
    """A goal within reach is a target in any mode, never doubled, and the nearest count stays."""
    goals = frozenset({2})
    assert frames(targets(LINE, 0, 20, replace(STEP_END, count=3), goals)) == [4, 8, 12]
    assert frames(targets(LINE, 0, 20, EVERY, goals)) == [6, 12, 18]
    assert frames(targets(LINE, 0, 20, EVERY, frozenset({1}))) == [6, 8, 12]
    # A goal at the reach takes the place of the waypoint there.
    assert targets(LINE, 7, 5, EVERY, goals) == (Target(12, 2),)
    assert targets(LINE, 9, 3, STEP_END, goals) == (Target(12, 2),)


def random_case(rng: random.Random) -> tuple[Timeline, int, int, FutureGuidance, frozenset[int]]:
    ends, end = [], 1
    for _ in range(rng.randint(1, 8)):
        end += rng.randint(1, 14)
        ends.append(end)
    guidance = FutureGuidance(
        mode=rng.choice(["planned", "joint", "given"]),
        place=rng.choice(["step_end", "every"]),
        every=rng.randint(1, 9),
        count=rng.randint(1, 8),
    )
    goals = frozenset(step for step in range(len(ends)) if rng.random() < 0.3)
    return Timeline(tuple(ends)), rng.randint(0, end + 2), rng.randint(-2, 25), guidance, goals


def test_laws_of_targets():
    """Whatever the setting: within [first, first + reach] and the video, ascending, at most
    `count`, each with the step it lies in; a waypoint only at the reach and only as the last;
    goals within reach come before anything farther away."""
    rng = random.Random(0)
    for _ in range(3000):
        timeline, first, reach, guidance, goals = random_case(rng)
        found = targets(timeline, first, reach, guidance, goals)
        assert len(found) <= guidance.count
        assert frames(found) == sorted(set(frames(found)))
        for target in found:
            assert first <= target.frame <= first + reach
            assert target.frame < timeline.latent_frames
            assert target.step == timeline.step_of(target.frame)
            if target.waypoint:
                assert target.frame == first + reach
                assert target == found[-1]
                assert guidance.mode != "given"
        near = [
            timeline.ends[step] - 1
            for step in goals
            if first <= timeline.ends[step] - 1 <= min(first + reach, timeline.latent_frames - 1)
        ]
        for goal in near:
            assert goal in frames(found) or (
                len(found) == guidance.count and found[-1].frame < goal
            )
        if guidance.mode != "given" and reach >= 0 and first < timeline.latent_frames:
            assert found, "predicted guidance always has something to look at"


# -- settings of guidance --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (
            {"mode": "psychic"},
            "guidance 'psychic' is not allowed; use one of planned, joint, given",
        ),
        ({"place": "end"}, "keyframes 'end' is not allowed; use one of step_end, every"),
        ({"every": 0}, "every 0 is not allowed; use 1 or more latent frames"),
        ({"count": 0}, "horizon 0 is not allowed; use 1 to 8 keyframes"),
        ({"count": 9}, "horizon 9 is not allowed; use 1 to 8 keyframes"),
        ({"plan_passes": 0}, "plan passes 0 is not allowed; use 1 or more"),
        ({"strength": -0.1}, "strength -0.1 is not allowed; use 0 (off) to 4, 1 is neutral"),
        ({"strength": 4.5}, "strength 4.5 is not allowed; use 0 (off) to 4, 1 is neutral"),
        ({"strength": float("nan")}, "strength nan is not allowed; use 0 (off) to 4"),
        ({"context_sigma": 1.0}, "context sigma 1.0 is not allowed; use 0 or more, below 1"),
        ({"count": 2.5}, "horizon 2.5 is not allowed; use 1 to 8"),
        ({"first_passes": 1.5}, "first passes 1.5 is not allowed"),
        ({"plan_passes": True}, "plan passes True is not allowed"),
        ({"refresh": "1"}, "refresh '1' is not allowed"),
        ({"strength": float("nan")}, "strength nan is not allowed"),
        ({"context_sigma": -0.5}, "context sigma -0.5 is not allowed; use 0 or more, below 1"),
        ({"first_passes": 0}, "first passes 0 is not allowed; use 1 or more, or leave it out"),
        ({"refresh": -1}, "refresh -1 is not allowed; use 0 (only when needed) or more chunks"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bad_guidance_is_refused_in_words(bad: dict[str, Any], words: str):
    """The setting as the node shows it, the value got, and what is allowed."""
    with pytest.raises(ValueError) as error:
        FutureGuidance(**bad)
    assert words in str(error.value)


def test_limits_of_guidance_are_allowed():
    """The ends of every range are inside it."""
    FutureGuidance(every=1, count=1, plan_passes=1, strength=0.0, first_passes=1, refresh=0)
    FutureGuidance(count=8, strength=4.0, context_sigma=0.999, refresh=10)


# -- settings of the cache and the sampler ---------------------------------------------------------

FEW = (1.0, 0.5, 0.0)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"sink": 1.0}, "sink 1.0 is not allowed; use 0 or more"),
        ({"window": 6.0}, "window 6.0 is not allowed; use whole latent frames"),
        ({"policy": ["x"]}, r"policy \['x'\] is unknown"),
        ({"sink": -1}, "sink -1 is not allowed; use 0 or more latent frames"),
        ({"policy": "magic"}, "policy 'magic' is unknown; use one of sink_window"),
        ({"positions": "polar"}, "positions 'polar' is unknown; use one of absolute, relative"),
    ],
    ids=["half sink", "half window", "list", "sink", "policy", "positions"],
)
def test_bad_cache_policies_are_refused(bad: dict[str, Any], words: str):
    """Impossible numbers and unknown names are refused with the names there are."""
    with pytest.raises(ValueError, match=words):
        CachePolicy(**bad)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"chunk": 0}, "chunk 0 is not allowed; use 1 to 64 latent frames"),
        ({"chunk": 65}, "chunk 65 is not allowed; use 1 to 64 latent frames"),
        ({"solver": "magic"}, "solver 'magic' is unknown; use renoise or euler"),
        ({"cfg": 0.5}, "cfg 0.5 is not allowed; use 1 (one branch) to 30"),
        ({"cfg": float("nan")}, "cfg nan is not allowed"),
        ({"context_sigma": 1.0}, "context sigma 1.0 is not allowed; use 0 up to 1"),
        ({"context_sigma": "0"}, "context sigma '0' is not allowed"),
        ({"chunk": 2.0}, "chunk 2.0 is not allowed; use 1 to 64"),
        ({"chunk": True}, "chunk True is not allowed"),
        ({"cfg": float("nan")}, "cfg nan is not allowed"),
        ({"cfg": "2"}, "cfg '2' is not allowed"),
        ({"span": float("nan")}, "span nan is not allowed"),
        ({"seeds": (0.5,)}, "seed 0.5 is not allowed"),
        ({"seeds": ()}, "there are no seeds; give one"),
        ({"sigmas": ((1,), 0)}, "sigmas [(1,), 0] do not descend"),
        ({"seeds": (0, -1)}, "seed -1 is not allowed; use 0 to 18446744073709551615"),
        ({"seeds": (2**64,)}, "is not allowed; use 0 to 18446744073709551615"),
        ({"sigmas": (1.0, 0.5)}, "sigmas [1, 0.5] do not end in 0; add it"),
        ({"sigmas": (0.0,)}, "sigmas [0] do not end in 0; add it"),
        ({"sigmas": (0.5, 1.0, 0.0)}, "sigmas [0.5, 1, 0] do not descend from 1 at most; sort"),
        ({"sigmas": (1.0, 0.5, 0.5, 0.0)}, "[1, 0.5, 0.5, 0] do not descend"),
        ({"sigmas": (1.5, 0.5, 0.0)}, "[1.5, 0.5, 0] do not descend from 1 at most"),
        ({"sigmas": (float("nan"), 0.5, 0.0)}, "[nan, 0.5, 0] do not descend"),
        ({"sigmas": (1.0, float("nan"), 0.0)}, "[1, nan, 0] do not descend"),
        ({"first_sigmas": (1.0, 0.5)}, "sigmas [1, 0.5] do not end in 0"),
        ({"sigmas": ()}, "sigmas [] do not end in 0"),
    ],
    ids=lambda value: str(value)[:32],
)
def test_bad_sampler_settings_are_refused(bad: dict[str, Any], words: str):
    """Refused when the settings are made, before any sampling, naming value and range."""
    with pytest.raises(ValueError) as error:
        replace(SamplerSettings(sigmas=FEW), **bad)
    assert words in str(error.value)


def test_a_window_holds_at_least_a_chunk():
    """A window smaller than a chunk is refused with a size that works; as large is allowed."""
    with pytest.raises(ValueError, match=r"window 2 is smaller than one chunk of 3 .* use 6 or"):
        SamplerSettings(sigmas=FEW, chunk=3, policy=CachePolicy(window=2))
    SamplerSettings(sigmas=FEW, chunk=3, policy=CachePolicy(window=3))


def test_keyframes_need_room_in_the_trained_span():
    """Sink and window may not fill the span when keyframes are wanted; the named fix works."""
    guidance = FutureGuidance()
    full = CachePolicy(sink=3, window=18, positions="relative")
    with pytest.raises(ValueError, match=r"sink 3 \+ window 18 leave no room .* window of 15 or"):
        SamplerSettings(sigmas=FEW, policy=full, guidance=guidance)
    SamplerSettings(sigmas=FEW, policy=replace(full, window=15), guidance=guidance)
    SamplerSettings(sigmas=FEW, policy=full)  # guidance off
    off = replace(guidance, strength=0.0)
    assert SamplerSettings(sigmas=FEW, policy=full, guidance=off).keyframes == 0
    SamplerSettings(sigmas=FEW, policy=replace(full, window=17), guidance=guidance)


@pytest.mark.parametrize(
    ("policy", "pinned"),
    [
        (CachePolicy(sink=1, window=6, positions="relative"), False),
        (CachePolicy(sink=0, window=6, positions="absolute"), False),
        (CachePolicy(sink=1, window=6, positions="absolute"), True),
        (CachePolicy(sink=0, window=None, positions="relative"), True),
    ],
    ids=["relative", "no sink", "absolute sink", "all"],
)
def test_length_is_bounded_where_history_pins_the_span(policy: CachePolicy, pinned: bool):
    """Guidance with history that is never left behind ends with the span; the message says with
    what it would not. Without guidance there is no bound."""
    guided = SamplerSettings(sigmas=FEW, policy=policy, guidance=FutureGuidance())
    guided.check_length(21)
    replace(guided, guidance=None).check_length(10_000)
    if not pinned:
        guided.check_length(10_000)
        return
    with pytest.raises(ValueError, match=r"22 latent frames .* 'relative' with a window of 1[78] "):
        guided.check_length(22)


def test_keyframes_stay_inside_the_span_for_any_allowed_settings():
    """For settings that are accepted, every chunk of a long video has a keyframe ahead of it and
    none beyond the span, counted from the oldest kept frame."""
    rng = random.Random(5)
    tried = 0
    while tried < 200:
        chunk = rng.randint(1, 5)
        policy = CachePolicy(
            sink=rng.randint(0, 4), window=rng.randint(chunk, 20), positions="relative"
        )
        try:
            settings = SamplerSettings(
                sigmas=FEW, chunk=chunk, policy=policy, guidance=FutureGuidance()
            )
        except ValueError:
            continue
        tried += 1
        held: tuple[int, ...] = ()
        timeline = Timeline(tuple(range(11, 102, 10)))
        for first in range(0, 100, chunk):
            placement = policy.place(held, first)
            oldest = placement.past[0] if held else placement.first
            reach = int(oldest + settings.span - 1 - placement.first)
            found = targets(timeline, first, reach, FutureGuidance(), NONE)
            assert found
            positions = [placement.first + target.frame - first for target in found]
            assert max(positions) - oldest < settings.span
            last = timeline.latent_frames - 1
            assert found[-1].frame >= min(first + chunk, last)
            held = policy.keep([*held, *range(first, first + chunk)], chunk)
            assert len(held) + chunk <= policy.capacity(10_000)
