"""A stream can be edited while it runs: edits land at a boundary, are refused, are recorded."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from sneakpeek_core.journal import read
from sneakpeek_core.policy import CachePolicy
from sneakpeek_core.recording import keep_journal, resume
from sneakpeek_core.stream import VideoStream
from tests.small import GUIDANCE, JOINT, THREE, conditioner, latents_of, model, settings, steps
from tests.three_steps import counted, same, small_stream


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


def test_an_encoder_that_fails_refuses_the_edit_and_nothing_else():
    """Whatever an encoder raises is the edit's end, not the stream's; an interrupt is neither."""
    changed = steps(*THREE[:2], "[1s] sing")
    source = small_stream()
    source.chunk(1)

    def broken(texts: list[str]) -> list[torch.Tensor]:
        raise error

    source.conditioner.encode = broken
    error: BaseException = KeyboardInterrupt()
    edit = source.edit(changed)
    with pytest.raises(KeyboardInterrupt):
        source.chunk(2)
    assert edit.state == "waiting"
    error = RuntimeError("the encoder died")
    assert same(list(source), list(small_stream()))
    assert (edit.state, edit.message) == ("refused", "the encoder died")


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
        assert len(list(read(path))) == 1 + 6 + 2
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
