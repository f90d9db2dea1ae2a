"""The future region of a stream: goal images, where keyframes stand, and whose text they follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sneakpeek_core.cache import Keyframe
from sneakpeek_core.denoiser import Branch
from sneakpeek_core.schedule import Schedule
from sneakpeek_core.stream import VideoStream
from tests.small import GUIDANCE, JOINT, RELATIVE, THREE, goal, latents_of, settings, steps
from tests.three_steps import same, small_stream


def with_goal(schedule: Schedule, index: int, latents: Tensor) -> Schedule:
    changed = list(schedule.steps)
    changed[index] = replace(changed[index], goal=latents)
    return replace(schedule, steps=tuple(changed))


def future_of(source: VideoStream) -> tuple[Keyframe, ...]:
    assert source.rollout is not None
    return source.rollout.caches[0].future


@pytest.mark.parametrize("mode", ["given", "planned"])
def test_a_given_keyframe_reaches_the_future_region(mode: str):
    """A goal image stands at the last frame of its step, clean whatever predictions are."""
    options = settings(guidance=replace(GUIDANCE, mode=mode, context_sigma=0.25))
    made = []
    for seed in (1, 2):
        source = small_stream(options, with_goal(steps(*THREE), 1, goal(seed)))
        source.chunk(1)
        keys = {key.frame: (key.step, key.sigma, key.source) for key in future_of(source)}
        predicted = {} if mode == "given" else {4: (0, 0.25, "predicted")}
        assert keys == predicted | {8: (1, 0.0, "given")}
        assert source.rollout is not None and source.rollout.keyframe_latents is not None
        assert torch.equal(source.rollout.keyframe_latents[:, :, -1:], goal(seed))
        made.append(latents_of(source))
    assert not torch.equal(made[0][:, :, 1:3], made[1][:, :, 1:3])
    unguided = latents_of(small_stream(replace(options, guidance=None)))
    assert not torch.equal(made[0][:, :, 1:3], unguided[:, :, 1:3])


def test_a_given_keyframe_in_a_joint_pass():
    """Denoised jointly, a goal image is told to be clean in every pass, the rest to be noisy."""
    source = small_stream(settings(guidance=JOINT), with_goal(steps(*THREE), 1, goal(1)))
    seen = spied_sigmas(source)
    source.chunk(1)
    context, *passes = seen
    assert context == [0.0]
    assert passes == [[sigma, sigma, sigma, 0.0] for sigma in (1.0, 0.8)]
    assert source.rollout is not None and source.rollout.keyframe_latents is not None
    assert torch.equal(source.rollout.keyframe_latents[:, :, 1:], goal(1))


def spied_sigmas(source: VideoStream) -> list[list[float]]:
    """Return a list that gets the sigmas of every network pass."""
    seen: list[list[float]] = []
    spy(source, lambda sigmas, branches: seen.append(list(sigmas)))
    return seen


def spy(source: VideoStream, look: Callable[[list[float], list[Branch]], None]) -> None:
    """Call `look` with the sigmas and branches of every network pass."""
    denoiser = source.model.denoiser

    class Spy:
        def __getattr__(self, name: str):
            return getattr(denoiser, name)

        def __call__(self, x, sigmas, rope, branches, *rest):
            look(sigmas, branches)
            return denoiser(x, sigmas, rope, branches, *rest)

    source.model = replace(source.model, denoiser=Spy())  # pyright: ignore[reportArgumentType]


def plans_of(source: VideoStream) -> list[tuple[int, list[Keyframe]]]:
    """Run a stream; return (first frame of the chunk, keyframes it was guided by) per chunk."""
    plans = []
    for chunk in source:
        if chunk.number:
            plans.append((chunk.first, list(future_of(source))))
    return plans


def test_keyframes_at_step_ends():
    """`step_end`: the last frame of the running step and of the next; replanned when reached."""
    plans = plans_of(small_stream())
    # Steps end with latent frames 4, 8 and 12. A plan stays until the frame it aims at is made.
    expected = {1: [4, 8], 3: [4, 8], 5: [8, 12], 7: [8, 12], 9: [12], 11: [12]}
    assert {first: [key.frame for key in keys] for first, keys in plans} == expected
    for _, keys in plans:
        assert [key.step for key in keys] == [(key.frame - 4) // 4 for key in keys]
        assert all(key.source == "predicted" and not key.waypoint for key in keys)
        assert all(key.version == 0 and key.sigma == 0.0 for key in keys)


def test_keyframes_every_n():
    """`every` n: the next multiples of n, the end of the video among them."""
    guidance = replace(GUIDANCE, place="every", every=5, count=2)
    plans = plans_of(small_stream(settings(guidance=guidance)))
    expected = {1: [5, 10], 3: [5, 10], 5: [5, 10], 7: [10, 12], 9: [10, 12], 11: [12]}
    assert {first: [key.frame for key in keys] for first, keys in plans} == expected
    # Frame 5 lies in the second step (frames 5 to 8), 10 and 12 in the third.
    steps_of = {5: 1, 10: 2, 12: 2}
    assert all(key.step == steps_of[key.frame] for _, keys in plans for key in keys)


def test_one_keyframe_and_refresh():
    """`count` limits the keyframes; `refresh` plans anew after that many chunks."""
    source = small_stream(settings(guidance=replace(GUIDANCE, count=1, refresh=2)))
    planned = []
    for chunk in source:
        if chunk.number:
            assert source.rollout is not None and len(future_of(source)) == 1
            planned.append(source.rollout.planned_at)
    # Frames 4 and 8 are reached before chunks 3 and 5; a refresh comes due nowhere else.
    assert planned == [1, 1, 3, 3, 5, 5]
    source = small_stream(settings(guidance=replace(GUIDANCE, refresh=1)))
    planned = []
    for chunk in source:
        if chunk.number:
            assert source.rollout is not None
            planned.append(source.rollout.planned_at)
    assert planned == [1, 2, 3, 4, 5, 6]


def test_waypoints_stay_within_the_trained_span():
    """A step that ends beyond the span gets a waypoint inside it, replanned when reached."""
    span = 12
    options = settings(span=span, policy=replace(RELATIVE, window=5))
    source = small_stream(options, steps("[10s] lift it", "[1s] put it down"))
    ends = (40, 44)
    waypoints = []
    for chunk in source:
        if not chunk.number:
            continue
        assert source.rollout is not None
        keys, kv = future_of(source), source.rollout.caches[0]
        assert keys, "a waypoint is always within reach"
        # Seen from the chunk: kept frames count from 0, the chunk comes behind them.
        first = len(kv.frames)
        places = [first + key.frame - chunk.first for key in keys]
        assert min(places) >= 0 and max(places) <= span - 1
        assert all(key.waypoint == (key.frame not in ends) for key in keys)
        assert all(key.step == (key.frame > ends[0]) for key in keys)
        waypoints += [key.frame for key in keys if key.waypoint]
    # The farthest frame inside the span, from the oldest kept frame at position 0.
    assert waypoints[0] == 11
    assert max(waypoints) > 30 and waypoints == sorted(waypoints)
    assert source.made == 45


def test_keyframes_of_an_edited_schedule():
    """An edit replans at once: the new keyframes bear the new version, and no longer the old."""
    source = small_stream()
    source.chunk(1)
    assert [(key.frame, key.version) for key in future_of(source)] == [(4, 0), (8, 0)]
    source.edit(steps("[1s] lift it", "[1.5s] turn it"))
    source.chunk(2)
    assert [(key.frame, key.version) for key in future_of(source)] == [(4, 1), (10, 1)]


def test_a_goal_that_comes_within_reach_is_planned_for():
    """A goal image beyond the span is shown as soon as it is inside."""
    options = settings(span=9, policy=replace(RELATIVE, window=4))
    source = small_stream(options, with_goal(steps("[2s] lift it", "[1s] wave"), 0, goal(3)))
    seen = {}
    for chunk in source:
        if chunk.number:
            seen[chunk.first] = [key.frame for key in future_of(source) if key.source == "given"]
    # Chunk 1 sees frame 0 at position 0, itself at 1: the span ends with frame 8, the step's last.
    assert seen[1] == [8]
    far = small_stream(options, with_goal(steps("[3s] lift it", "[1s] wave"), 0, goal(3)))
    given = {}
    for chunk in far:
        if chunk.number:
            given[chunk.first] = [key.frame for key in future_of(far) if key.source == "given"]
    # Three frames are kept: a chunk stands at 3, so frame 12 is within reach from frame 7 on.
    assert given == {1: [], 3: [], 5: [], 7: [12], 9: [12], 11: [12], 13: [], 15: []}


def test_every_frame_attends_to_the_text_of_its_own_step():
    """A chunk across a step boundary is told two texts, frame by frame; keyframes their own."""
    source = small_stream(image=False)  # chunks of frames 0 1, 2 3, 4 5, 6 7, 8 9, ...
    seen: list[list[int]] = []
    texts = source.conditioning.texts

    def look(_: list[float], branches: list[Branch]) -> None:
        [branch] = branches
        seen.append([next(i for i, t in enumerate(texts) if t is text) for text in branch.texts])

    spy(source, look)
    chunks = list(source)

    # Steps end behind frames 4, 8 and 12. A plan is 3 passes, a chunk 2, its context 1.
    def passes(plan: list[int], *frames: int) -> list[list[int]]:
        return [plan] * (3 if plan else 0) + [list(frames)] * 3

    expected = [
        *passes([0, 1], 0, 0), *passes([], 0, 0), *passes([], 0, 1),
        *passes([1, 2], 1, 1), *passes([], 1, 2), *passes([2], 2, 2), *passes([], 2, 2),
    ]  # fmt: skip
    # The last chunk is sampled whole and trimmed after; no context pass follows it.
    assert seen == expected[:-1]
    assert chunks[-1].latents_BCFHW.shape[2] == 1
    assert [chunk.step for chunk in chunks] == [0, 0, 0, 1, 1, 2, 2]


def test_the_second_half_of_a_chunk_follows_its_own_text():
    """Changing the text behind a boundary inside a chunk changes that chunk."""
    plain = settings(guidance=None)
    a = list(small_stream(plain, steps(*THREE), image=False))
    b = list(small_stream(plain, steps(THREE[0], "[1s] drop it", THREE[2]), image=False))
    assert same(a[:2], b[:2]) and not torch.equal(a[2].latents_BCFHW, b[2].latents_BCFHW)
