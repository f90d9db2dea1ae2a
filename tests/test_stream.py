"""A stream can be pulled from again, frozen and continued; what does not fit is refused."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sneakpeek_core.policy import CachePolicy
from sneakpeek_core.recording import keep_journal, resume
from sneakpeek_core.schedule import Schedule
from sneakpeek_core.stream import Chunk, GenerationError, VideoStream
from tests.small import (
    GUIDANCE,
    JOINT,
    RELATIVE,
    TEXT_DIM,
    THREE,
    conditioner,
    latents_of,
    model,
    settings,
    small_model,
    start,
    steps,
    stream,
)
from tests.three_steps import continued, counted, same, small_stream

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


def test_what_is_handed_out_and_in_may_be_written_to():
    """A consumer that writes to its chunks, to the start or to its texts changes no video."""
    schedule, image = with_embeds(torch.ones(1, 3, TEXT_DIM)), start()
    source, twin = (
        VideoStream(model(), conditioner(), schedule, settings(), width=32, height=32, start=image)
        for _ in range(2)
    )
    expected = latents_of(source)
    twin.chunk(1)
    frozen = twin.freeze()
    frozen_texts = [text.clone() for text in frozen.conditioning.texts]
    image.zero_()
    made = []
    for chunk in twin:
        made.append(chunk.latents_BCFHW.clone())
        chunk.latents_BCFHW.zero_()
    assert torch.equal(torch.cat(made, dim=2), expected)
    schedule.steps[0].embeds.zero_()
    assert all(map(torch.equal, frozen.conditioning.texts, frozen_texts))
    assert frozen.conditioning.schedule.steps[0].embeds is frozen.conditioning.texts[0]


def test_a_conditioner_is_left_as_it_was(tmp_path: Path):
    """Going on from a cache or a journal teaches the caller's conditioner nothing."""
    source = small_stream()
    keep_journal(source, tmp_path / "x.journal")
    source.chunk(1)
    source.close()
    given = conditioner(negative=None, fps=16.0)
    VideoStream.continue_from(source.freeze(), model(), given, settings())
    assert (given.negative, given.known) == (None, {})
    given.fps = 8.0
    resume(tmp_path / "x.journal", model(), given).close()
    assert (given.negative, given.known, given.fps) == (None, {}, 8.0)


def test_a_dropped_stream_frees_its_caches_at_once():
    """No circle of references keeps gigabytes alive until a garbage collection."""
    source = small_stream()
    source.chunk(1)
    assert source.rollout is not None
    kept = weakref.ref(source.rollout.caches[0])
    gc.disable()
    try:
        del source
        assert kept() is None
    finally:
        gc.enable()


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


def test_the_settings_of_a_start_image_go_on_from_its_cache():
    """Settings without a sink that made a video from an image also continue its cache."""
    options = settings(policy=replace(RELATIVE, sink=0))
    source = small_stream(options)
    source.chunk(2)
    after = continued(source.freeze(), options=options)
    assert after.settings == source.settings != options
    assert same(list(source)[3:], [c._replace(number=c.number + 3) for c in after])
    plain = small_stream(options, image=False)
    plain.chunk(2)
    assert continued(plain.freeze(), options=options).settings == options


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


NAN = float("nan")
BAD_PARTS = {
    "2d text": ({"embeds": torch.ones(3, TEXT_DIM)}, "step 1 is embedded as (3, 32), not [1, tok"),
    "width": ({"embeds": torch.ones(1, 3, 33)}, "(1, 3, 33), not [1, tokens, 32]; use the text en"),
    "rows": ({"embeds": torch.ones(3, 3, TEXT_DIM)}, "(3, 3, 32), not [1, tokens, 32]"),
    "no tokens": ({"embeds": torch.ones(1, 0, TEXT_DIM)}, "(1, 0, 32), not"),
    "whole": ({"embeds": torch.ones(1, 3, TEXT_DIM, dtype=torch.long)}, "not all finite fractions"),
    "nan": ({"embeds": torch.full((1, 3, TEXT_DIM), NAN)}, "step 1 is not all finite fractions"),
    "goal size": ({"goal": torch.ones(1, 16, 1, 8, 8)}, "goal of step 1 is (1, 16, 1, 8, 8), not"),
    "goal frames": ({"goal": torch.ones(1, 16, 2, 4, 4)}, "not [1, 16, 1, 4, 4]; encode a picture"),
    "goal rows": ({"goal": torch.ones(2, 16, 1, 4, 4)}, "goal of step 1 is (2, 16, 1, 4, 4)"),
    "goal nan": ({"goal": torch.full((1, 16, 1, 4, 4), NAN)}, "the goal of step 1 is not all fin"),
}


def with_embeds(embeds: torch.Tensor) -> Schedule:
    first, *rest = steps(*THREE).steps
    return Schedule((replace(first, embeds=embeds), *rest))


@pytest.mark.parametrize("name", BAD_PARTS)
def test_texts_and_goals_that_do_not_fit_are_refused_in_words(name: str):
    """Checked before any sampling, and before an edit lands: the stream goes on without it."""
    parts, message = BAD_PARTS[name]
    first, *rest = steps(*THREE).steps
    bad = Schedule((replace(first, **parts), *rest))
    with pytest.raises(ValueError, match=re.escape(message)):
        small_stream(schedule=bad)
    source = small_stream()
    edit = source.edit(Schedule((*steps(*THREE).steps[:2], replace(rest[1], **parts))))
    assert same(list(source), list(small_stream()))
    assert edit.state == "refused" and message.replace("step 1", "step 3") in edit.message


def test_a_negative_text_that_does_not_fit_is_refused_in_words():
    """The negative text is checked like the others."""
    with pytest.raises(ValueError, match="the negative text is embedded as"):
        VideoStream(
            model(), conditioner(negative=torch.ones(1, 2, 9)), steps(*THREE), settings(cfg=2.0),
            width=32, height=32,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (start()[:, :, :0], "has 0 latent frames, the video 13; give it 1 to 13"),
        (start(14), "has 14 latent frames, the video 13"),
        (start()[0], "latents are (16, 1, 4, 4), not (1, 16, 1, 4, 4); resize"),
        (start() * NAN, "not all finite fractions; encode it again"),
        (start().long(), "not all finite fractions; encode it again"),
    ],
    ids=["none", "long", "4d", "nan", "whole"],
)
def test_a_start_that_does_not_fit_is_refused_in_words(latents: torch.Tensor, message: str):
    """A start is 1 latent frame to the whole video, of finite numbers."""
    with pytest.raises(ValueError, match=re.escape(message)):
        VideoStream(
            model(), conditioner(), steps(*THREE), settings(), width=32, height=32, start=latents
        )


def test_a_cache_takes_no_start():
    """A continuation begins with the end of the cache."""
    source = small_stream()
    source.chunk(1)
    with pytest.raises(ValueError, match="goes on from its own end; leave the start out"):
        VideoStream(
            model(), conditioner(), steps(*THREE), settings(), width=32, height=32, start=start(),
            cache=source.freeze(),
        )  # fmt: skip


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
    "context sigma": (
        lambda: {"options": settings(context_sigma=0.1)},
        "made with context sigma 0, not 0.1; use 0",
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


@torch.no_grad()
def test_changed_weights_change_the_next_generation():
    """What a text costs is kept for one generation: a stream made after training or patching the
    same tree sees the new cross-attention."""
    own = small_model()
    before = latents_of(stream(steps(*THREE), model=own))
    for block in own.denoiser.tree.blocks:
        block.cross_attn.v.weight.mul_(-1.0)
    after = latents_of(stream(steps(*THREE), model=own))
    assert not torch.equal(before, after)
    fresh = small_model()
    fresh.denoiser.tree.load_state_dict(own.denoiser.tree.state_dict())
    assert torch.equal(after, latents_of(stream(steps(*THREE), model=fresh)))
