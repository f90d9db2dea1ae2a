"""A stream can be pulled from again, edited while it runs, frozen, journalled and continued."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sneakpeek_core.cache import Keyframe
from sneakpeek_core.denoiser import Branch
from sneakpeek_core.frozen import FrozenCache
from sneakpeek_core.journal import read
from sneakpeek_core.policy import CachePolicy
from sneakpeek_core.recording import keep_journal, resume
from sneakpeek_core.schedule import Schedule
from sneakpeek_core.settings import SamplerSettings
from sneakpeek_core.stream import Chunk, GenerationError, Model, VideoStream
from tests.small import (
    GUIDANCE,
    RELATIVE,
    conditioner,
    latents_of,
    settings,
    small_model,
    start,
    steps,
    stream,
)

THREE = ("[1s] lift it", "[1s] turn it", "[1s] put it down")  # 5, 9 and 13 latent frames
JOINT = replace(GUIDANCE, mode="joint")


@cache
def model() -> Model:
    return small_model()


def small_stream(
    options: SamplerSettings | None = None, schedule: Schedule | None = None, image: bool = True
) -> VideoStream:
    return stream(schedule or steps(*THREE), options, model=model(), image=image)


def continued(
    frozen: FrozenCache, more: Schedule | None = None, options: SamplerSettings | None = None
) -> VideoStream:
    options = options or frozen.settings
    return VideoStream.continue_from(frozen, model(), conditioner(), options, more)


def counted(source: VideoStream) -> list[int]:
    """Return a list that grows with every network pass of the stream."""
    passes: list[int] = []
    source.before_pass = lambda: passes.append(len(passes))
    return passes


def future_of(source: VideoStream) -> tuple[Keyframe, ...]:
    assert source.rollout is not None
    return source.rollout.caches[0].future


def same(a: list[Chunk], b: list[Chunk]) -> bool:
    """Whether two lists hold the same chunks, latents bit for bit."""
    return len(a) == len(b) and all(
        (x.number, x.first, x.step, x.text) == (y.number, y.first, y.step, y.text)
        and torch.equal(x.latents_BCFHW, y.latents_BCFHW)
        for x, y in zip(a, b, strict=True)
    )


# -- pulling ---------------------------------------------------------------------------------------


def test_a_stream_samples_once_however_it_is_pulled():
    """Two iterators, interleaved, one after the other or by number, share one sampling."""
    once = small_stream()
    expected_passes = counted(once)
    expected = list(once)

    source = small_stream()
    passes = counted(source)
    ahead, behind = iter(source), iter(source)
    got_ahead, got_behind = [next(ahead)], []
    for chunk in behind:
        got_behind.append(chunk)
        got_ahead += [chunk] if (chunk := next(ahead, None)) else []
    assert same(got_ahead, expected)
    assert same(got_behind, expected)
    assert same(list(source), expected)
    third = source.chunk(3)
    assert third is not None and same([third], expected[3:4])
    assert source.chunk(len(expected)) is None
    assert len(passes) == len(expected_passes)


def test_threads_share_one_sampling():
    """Two threads that iterate one stream get the same chunks, sampled once."""
    once = small_stream()
    expected_passes = counted(once)
    expected = list(once)

    source = small_stream()
    passes = counted(source)
    got: list[list[Chunk]] = [[], []]
    both = threading.Barrier(2)

    def pull(into: list[Chunk]) -> None:
        both.wait()
        into.extend(source)

    threads = [threading.Thread(target=pull, args=(into,)) for into in got]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(got[0], expected) and same(got[1], expected)
    assert len(passes) == len(expected_passes)


def test_chunks_are_made_when_they_are_asked_for():
    """A chunk leaves before its context pass, and nothing is made ahead."""
    source = small_stream(settings(guidance=None))
    passes = counted(source)
    source.chunk(0)
    assert passes == []  # the start image
    source.chunk(1)
    assert len(passes) == 1 + 2  # its context pass, two of the chunk
    source.chunk(2)
    assert len(passes) == 3 + 1 + 2


def test_the_start_comes_first_and_the_end_is_trimmed():
    """The start image is the first chunk; the last is trimmed to the timeline's length."""
    source = small_stream(settings(chunk=3), steps("[1.5s] lift it", "[1s] put it down"))
    chunks = list(source)
    assert torch.equal(chunks[0].latents_BCFHW, start())
    assert [chunk.first for chunk in chunks] == [0, 1, 4, 7, 10]
    assert [chunk.latents_BCFHW.shape[2] for chunk in chunks] == [1, 3, 3, 3, 1]
    assert source.timeline.latent_frames == source.made == 11
    assert [chunk.step for chunk in chunks] == [0, 0, 0, 1, 1]
    assert [chunk.text for chunk in chunks] == ["lift it"] * 3 + ["put it down"] * 2

    without = list(small_stream(settings(chunk=3), source.schedule, image=False))
    assert [chunk.latents_BCFHW.shape[2] for chunk in without] == [3, 3, 3, 2]
    # Trimming changes nothing that is kept: a longer video has the same frames there.
    plain = settings(chunk=3, guidance=None)
    longer = steps("[1.5s] lift it", "[2s] put it down")
    short = latents_of(small_stream(plain, source.schedule))
    assert torch.equal(short, latents_of(small_stream(plain, longer))[:, :, :11])


def test_a_start_clip_is_cut_into_chunks():
    """4n+1 start frames are the image and whole chunks; whole chunks stay whole."""
    for frames, sizes in ((1, [1]), (2, [2]), (3, [1, 2]), (4, [2, 2]), (5, [1, 2, 2])):
        source = VideoStream(
            model(), conditioner(), steps(*THREE), settings(), width=32, height=32,
            start=start(frames),
        )  # fmt: skip
        assert len(source) == len(sizes)
        parts = [chunk.latents_BCFHW for _, chunk in zip(sizes, source, strict=False)]
        assert [part.shape[2] for part in parts] == sizes
        assert torch.equal(torch.cat(parts, dim=2), start(frames))
        assert latents_of(source).shape[2] == 13


def test_a_start_image_is_never_evicted():
    """A stream with a start image has a sink, whatever the policy says."""
    source = small_stream(settings(policy=replace(RELATIVE, sink=0, window=4), guidance=None))
    latents_of(source)
    assert source.settings.policy.sink == 1
    assert source.freeze().frames[0] == 0


def test_going_on_behind_a_trimmed_chunk():
    """A video that ended inside a chunk goes on exactly where it ended."""
    short = steps("[1.5s] lift it", "[1s] put it down")
    more = steps("[1s] stir it", "[1s] taste it")
    for options in (settings(chunk=3), settings(chunk=3, policy=CachePolicy(), guidance=None)):
        source = small_stream(options, short)
        whole = latents_of(source)
        frozen = source.freeze()
        assert frozen.frontier == 11
        after = continued(frozen, more)
        chunks = list(after)
        assert [chunk.first for chunk in chunks] == [11, 14, 17]
        assert [chunk.step for chunk in chunks] == [2, 2, 3]
        assert after.made == after.timeline.latent_frames == 19
        # An edit that lengthens the ended stream is the same thing.
        edit = source.edit(short.extended(more))
        assert source.chunk(5) is not None and edit.state == "landed"
        assert torch.equal(latents_of(source)[:, :, :11], whole)
        made = torch.cat([chunk.latents_BCFHW for chunk in chunks], dim=2)
        assert torch.equal(latents_of(source)[:, :, 11:], made)
        assert source.freeze().frames == after.freeze().frames
    with pytest.raises(ValueError, match="all generated; give it more steps"):
        continued(frozen)


def test_both_caches_of_cfg_advance():
    """With cfg above 1 the negative text has a cache of its own, advanced together."""
    source = small_stream(settings(cfg=3.0))
    made = latents_of(source)
    source.freeze()
    assert source.rollout is not None
    first, second = source.rollout.caches
    assert first.frames == second.frames == (0, 9, 10, 11, 12)
    assert first.future == second.future
    for a, b in zip(first.contents(), second.contents(), strict=True):
        assert (a != 0).any() and (b != 0).any() and not torch.equal(a, b)
    assert not torch.equal(made, latents_of(small_stream(settings(cfg=4.0))))
    assert not torch.equal(made, latents_of(small_stream()))
    with pytest.raises(ValueError, match="cfg 3 needs a negative text"):
        VideoStream(
            model(), conditioner(negative=None), steps(*THREE), settings(cfg=3.0),
            width=32, height=32,
        )  # fmt: skip


# -- editing ---------------------------------------------------------------------------------------


def test_an_edit_lands_at_the_next_boundary():
    """An edit from another thread, in the middle of a chunk, takes effect with the next one."""
    untouched = list(small_stream())
    source = small_stream()
    passes = counted(source)
    source.chunk(2)  # latent frames up to 4
    changed = steps("[1s] lift it", "[1s] throw it", "[1s] put it down")
    edits = []

    def before_pass() -> None:
        passes.append(0)
        if not edits:  # the context pass in front of chunk 3
            worker = threading.Thread(target=lambda: edits.append(source.edit(changed)))
            worker.start()
            worker.join(timeout=10)

    source.before_pass = before_pass
    third = source.chunk(3)
    [edit] = edits
    assert third is not None and same([third], untouched[3:4])
    assert (edit.state, edit.wait(0)) == ("waiting", False)
    assert source.landed == []
    fourth = source.chunk(4)
    assert fourth is not None and not same([fourth], untouched[4:5])
    assert (edit.state, edit.latent_frame, edit.wait(0)) == ("landed", 7, True)
    assert fourth.text == "throw it"
    # Six latent frames behind the first, at four a second.
    assert source.landed == [{"latent_frame": 7, "seconds": 1.5, "steps": changed.to_text()}]
    made = list(source)
    assert same(made[:4], untouched[:4])
    assert [chunk.text for chunk in made][3:] == [
        "turn it",
        "throw it",
        "put it down",
        "put it down",
    ]


def test_waiting_for_an_edit():
    """`Edit.wait` returns when the edit has landed."""
    source = small_stream()
    source.chunk(1)
    edit = source.edit(steps("[1s] lift it", "[1s] throw it"))
    waited = []
    worker = threading.Thread(target=lambda: waited.append(edit.wait(20)))
    worker.start()
    source.chunk(2)
    worker.join()
    assert waited == [True] and edit.state == "landed" and edit.latent_frame == 3


@pytest.mark.parametrize("guidance", [None, GUIDANCE, JOINT], ids=["off", "planned", "joint"])
def test_edits_lengthen_and_shorten(guidance):
    """Chunks already made stay as they are; the video ends where the edited schedule ends."""
    for seconds, latent_frames in (("3", 21), ("0.5", 11)):
        source = small_stream(settings(guidance=guidance))
        source.chunk(3)
        before = list(small_stream(settings(guidance=guidance)))[:4]
        edit = source.edit(steps(*THREE[:2], f"[{seconds}s] put it down"))
        made = list(source)
        assert edit.state == "landed" and same(made[:4], before)
        assert source.made == latents_of(source).shape[2] == latent_frames
        assert [chunk.first for chunk in made] == [0, *range(1, latent_frames, 2)]


def test_an_edit_makes_a_full_cache_grow():
    """With everything kept, a longer schedule gets a larger cache; the past is still all there."""
    options = settings(policy=CachePolicy(), guidance=None)
    longer = steps(*THREE, "[2s] wave")
    # No keyframes: what comes later has no part in what is made, so the long video is known.
    expected = latents_of(small_stream(options, longer))
    for made in (1, 3, 7):
        source = small_stream(options)
        source.chunk(made - 1)
        size = source.cache_spec.past
        source.edit(longer)
        assert torch.equal(latents_of(source), expected)
        assert source.cache_spec.past == size + 8
        assert source.freeze().frames == tuple(range(21))


def test_a_finished_step_cannot_be_edited():
    """What cannot be is refused at once, naming the step; nothing changes."""
    source = small_stream()
    expected = list(small_stream())
    source.chunk(3)  # seven latent frames, the first step has five
    for schedule, message in (
        (steps("[1s] drop it", *THREE[1:]), "step 1 has been generated.*edit step 2"),
        (steps("[2s] lift it", *THREE[1:]), "step 1 has been generated"),
        (steps("[0.75s] lift it", "[0.75s] turn it"), "step 1 has been generated"),
        (steps("[1s] lift it", "[0.5s] turn it"), "ends at 1.5 s.*1.5 s have been generated"),
    ):
        with pytest.raises(ValueError, match=message):
            source.edit(schedule)
    assert same(list(source), expected) and source.landed == []
    assert source.conditioning.version == 0


@pytest.mark.parametrize(
    "late", [(THREE[0], "[1s] shake it", THREE[2]), (THREE[0], "[0.75s] turn it")]
)
def test_an_edit_that_comes_too_late_is_refused_where_it_lands(late: tuple[str, ...]):
    """An edit that was possible when it was proposed may be late: it says so, and has no effect."""
    source, expected = small_stream(), list(small_stream())
    source.chunk(3)  # frames up to 6, in the second step; the next chunk is its last
    edits = []

    def before_pass() -> None:
        if not edits:
            edits.append(source.edit(steps(*late)))
            edits.append(source.edit(steps(*THREE[:2], "[1s] wave")))

    source.before_pass = before_pass
    made = list(source)
    refused, fine = edits
    assert same(made[:5], expected[:5]) and len(made) == len(expected)
    assert (refused.state, refused.latent_frame, refused.wait(0)) == ("refused", 9, True)
    assert "step 2 has been generated" in refused.message
    assert "edit step 3" in refused.message
    # It stands in nobody's way.
    assert fine.state == "landed" and made[5].text == "wave"
    assert [entry["steps"] for entry in source.landed] == [fine.schedule.to_text()]


def test_an_edit_cannot_leave_the_trained_span():
    """Positions that are pinned cannot grow beyond the span: the edit is refused in words."""
    options = settings(policy=CachePolicy(sink=1, window=4))
    source = small_stream(options)
    source.chunk(1)
    edit = source.edit(steps(*THREE[:2], "[9s] put it down"))
    assert same(list(source), list(small_stream(options)))
    assert edit.state == "refused" and "trained on" in edit.message


def test_edits_survive_the_journal(tmp_path: Path):
    """A stream that was edited is resumed as it was: the same chunks, the same edits, and on."""
    first = steps("[1s] lift it", "[1s] throw it", "[1s] put it down")
    second = steps("[1s] lift it", "[1s] throw it", "[1.5s] pick it up", "[1s] wave")

    def edited(source: VideoStream) -> VideoStream:
        source.chunk(1)
        source.edit(first)
        source.chunk(3)
        source.edit(second)
        source.chunk(4)
        return source

    for late in (False, True):  # a journal from the beginning, or from the fifth chunk on
        path = tmp_path / f"{late}.journal"
        source = small_stream()
        if not late:
            keep_journal(source, path)
        edited(source)
        if late:
            keep_journal(source, path)
        source.chunk(5)
        source.close()
        assert len(read(path)[0]) == 1 + 6 + 2
        again = resume(path, model(), conditioner(encode=None))
        again.close()
        assert again.landed == source.landed
        assert [entry["latent_frame"] for entry in again.landed] == [3, 7]
        assert same(list(again), list(source))
        assert again.schedule == second


def test_an_edit_without_a_chunk_yet_is_in_a_late_journal(tmp_path: Path):
    """A journal that begins between an edit and its first chunk holds the edit."""
    source = small_stream()
    source.chunk(1)
    source.edit(steps(*THREE, "[1s] wave"))

    def interrupt() -> None:
        raise KeyboardInterrupt

    source.before_pass = interrupt
    with pytest.raises(KeyboardInterrupt):
        source.chunk(2)
    source.before_pass = lambda: None
    keep_journal(source, tmp_path / "x.journal")
    source.close()
    again = resume(tmp_path / "x.journal", model(), conditioner())
    again.close()
    assert again.landed == source.landed != []
    assert same(list(again), list(source))


def test_a_refused_journal_record_keeps_the_edit_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An edit that cannot be recorded does not take effect, and lands with the next attempt."""
    changed = steps("[1s] lift it", "[1s] throw it", "[1s] put it down")
    expected = small_stream()
    expected.chunk(1)
    expected.edit(changed)

    source = small_stream()
    keep_journal(source, tmp_path / "x.journal")
    source.chunk(1)
    edit = source.edit(changed)
    with monkeypatch.context() as patch:
        patch.setattr("sneakpeek_core.journal.to_bytes", raise_full_disk)
        with pytest.raises(OSError, match="No space"):
            source.chunk(2)
        assert edit.state == "waiting" and source.landed == []
    assert same(list(source), list(expected))
    source.close()
    again = resume(tmp_path / "x.journal", model(), conditioner())
    again.close()
    assert same(list(again), list(expected))


def raise_full_disk(*_: object) -> bytes:
    raise OSError(28, "No space left on device")


# -- the future region -----------------------------------------------------------------------------


def goal(seed: int) -> Tensor:
    return torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def with_goal(schedule: Schedule, index: int, latents: Tensor) -> Schedule:
    changed = list(schedule.steps)
    changed[index] = replace(changed[index], goal=latents)
    return replace(schedule, steps=tuple(changed))


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


# -- texts -----------------------------------------------------------------------------------------


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


# -- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 4, 5, 8, 10, 11, 13, 14])
def test_nan_ends_with_a_sentence_and_goes_on(at: int):
    """NaN at any pass: a sentence; what was made stays, and neither cache nor plan keeps NaN.

    The 1st pass is a context pass, 2 to 4 are a plan (4 writes it), 5 and 6 a chunk.
    """
    own = small_model()
    expected = stream(steps(*THREE), model=own)
    wanted = list(expected)
    bias = own.denoiser.tree.blocks[0].self_attn.o.bias
    good = bias.clone()
    source = stream(steps(*THREE), model=own)
    passes: list[int] = []

    def before_pass() -> None:
        passes.append(0)
        if len(passes) == at:
            bias[0] = float("nan")

    source.before_pass = before_pass
    with pytest.raises(GenerationError, match=r"gave NaN or infinity at [\d.]+ s; what was made"):
        list(source)
    bias.copy_(good)  # as if another dtype had been taken
    made = len(source)
    boundary = stream(steps(*THREE), model=own)
    boundary.chunk(made - 1)
    frozen, other = source.freeze(), boundary.freeze()
    assert (frozen.frontier, frozen.frames) == (other.frontier, other.frames)
    for mine, good_part in zip(frozen.keys + frozen.values, other.keys + other.values, strict=True):
        assert torch.isfinite(mine).all()
        past = mine[:, :, len(frozen.future) :], good_part[:, :, len(other.future) :]
        assert torch.equal(*past)
    assert same(list(source), wanted)


def test_nan_from_the_weights_is_said_at_the_first_chunk():
    """A model that only gives NaN gives a sentence, not a video."""
    own = small_model()
    own.denoiser.tree.head.head.bias[0] = float("nan")
    source = stream(steps(*THREE), settings(guidance=None), model=own, image=False)
    for _ in range(2):
        with pytest.raises(GenerationError, match=r"at 0 s; .* another dtype"):
            source.chunk(0)
    assert (len(source), source.made) == (0, 0)


MISMATCHES = {
    "another model": (lambda: {"model": small_model(seed=1)}, "made with another model"),
    "chunk": (lambda: {"options": settings(chunk=3)}, "made with chunk 2, not 3; use 2"),
    "sink": (
        lambda: {"options": settings(policy=replace(RELATIVE, sink=2))},
        "made with sink 1, not 2; use 1",
    ),
    "window": (
        lambda: {"options": settings(policy=replace(RELATIVE, window=8))},
        "made with window 6, not 8; use 6",
    ),
    "window all": (
        lambda: {"options": settings(policy=replace(RELATIVE, window=None))},
        "made with window 6, not all",
    ),
    "positions": (
        lambda: {"options": settings(policy=replace(RELATIVE, positions="absolute"))},
        "made with positions relative, not absolute; use relative",
    ),
    "cfg": (lambda: {"options": settings(cfg=3.0)}, "made with cfg 1, not above 1"),
    "batch": (lambda: {"options": settings(seeds=(0, 1))}, "made with a batch of 1, not 2; use 1"),
    "fps": (lambda: {"conditioner": conditioner(fps=8.0)}, "made with frame rate 16, not 8"),
    "size": (lambda: {"size": (64, 32)}, "made with size 32x32, not 64x32; use 32x32"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_cache_that_does_not_fit_is_refused_in_words(name: str):
    """Whatever shaped a cache must be the same to go on from it; the message says what is not."""
    changes, message = MISMATCHES[name]
    source = small_stream()
    source.chunk(1)
    frozen = source.freeze()
    given = {"model": model(), "conditioner": conditioner(), "options": settings()} | changes()
    width, height = given.get("size", (32, 32))
    with pytest.raises(ValueError, match=message):
        VideoStream(
            given["model"], given["conditioner"], steps(*THREE), given["options"],
            width=width, height=height, cache=frozen,
        )  # fmt: skip


def test_steps_seed_sigmas_and_guidance_may_differ():
    """Whatever did not shape a cache is free: the continuation follows the new settings."""
    source = small_stream()
    source.chunk(3)
    frozen = source.freeze()
    expected = latents_of(continued(frozen))
    for options in (
        settings(seeds=(5,)),
        settings(sigmas=(1.0, 0.9, 0.5, 0.0)),
        settings(guidance=None),
        settings(guidance=JOINT),
        settings(guidance=replace(GUIDANCE, count=4)),
        settings(span=12),
        settings(context_sigma=0.1),
        settings(solver="euler"),
    ):
        made = latents_of(continued(frozen, options=options))
        assert made.shape == expected.shape and torch.isfinite(made).all()
        same_plan = options.span == 12  # the plan in force was made before
        assert same_plan or not torch.equal(made, expected)
    longer = continued(frozen, steps("[1s] wave"))
    assert longer.made == 7 and latents_of(longer).shape[2] == 17 - 7
    assert longer.conditioning.version == frozen.conditioning.version + 1


def test_a_journal_that_does_not_fit_is_refused_in_words(tmp_path: Path):
    """A journal belongs to its model, and to the cache that its stream had continued."""
    source = small_stream()
    source.chunk(2)
    frozen = source.freeze()
    after = continued(frozen)
    keep_journal(after, tmp_path / "after.journal")
    after.chunk(1)
    after.close()
    keep_journal(source, tmp_path / "source.journal")
    source.close()
    other = continued(frozen)
    other.chunk(0)
    for name, made_with, given, message in (
        ("source", small_model(seed=1), None, "made with another model"),
        ("source", model(), frozen, "does not go on from a cache; leave it out"),
        ("after", model(), None, "goes on from a cache; give that one"),
        ("after", model(), other.freeze(), "goes on from a cache; give that one"),
    ):
        with pytest.raises(ValueError, match=message):
            resume(tmp_path / f"{name}.journal", made_with, conditioner(), given)
    again = resume(tmp_path / "after.journal", model(), conditioner(), frozen)
    again.close()
    assert same(list(again), list(continued(frozen)))
