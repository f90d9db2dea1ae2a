"""Law 8: an interrupt or an exception, anywhere, costs nothing that was made."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import cast

import pytest
import torch
from torch import Tensor

from sneakpeek_core import frames
from sneakpeek_core.frames import FrameChunk, FrameCursor, Recorder
from sneakpeek_core.recording import keep_journal, resume
from sneakpeek_core.stream import VideoStream
from sneakpeek_core.vae import streaming
from sneakpeek_core.vae.streaming import StreamingDecoder
from sneakpeek_core.video import VideoWriter
from tests.interrupts import (
    ERRORS,
    MODES,
    PASSES,
    Interrupted,
    Recording,
    Trip,
    Undisturbed,
    check_boundary,
    undisturbed_runs,
)
from tests.laws import continued, small_stream, vae
from tests.small import conditioner, latents_of, model, settings


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Undisturbed]:
    return undisturbed_runs(tmp_path_factory)


def test_the_passes_of_a_run(undisturbed):
    """The parametrised tests below visit every pass."""
    for mode, passes in PASSES.items():
        assert undisturbed(mode).passes == passes
        assert not any(kv.isnan().any() for kv in undisturbed(mode).boundaries[-1].keys)


def check_goes_on(
    recording: Recording, expected: Undisturbed, error: BaseException, at: int
) -> None:
    """Run into an error, then on: the end is that of the undisturbed run.

    Every third time the stream is frozen in between, every fourth time it is a recording.
    """
    with pytest.raises(type(error)) as caught:
        recording.finish() if at % 4 == 0 else list(recording.stream)
    assert caught.value is error
    if at % 3 == 0:
        check_boundary(recording.stream, expected)
    if at % 4 == 0:
        recording.finish().check_equals(expected.recording)
        return
    made, wanted = list(recording.stream), expected.recording.chunks()
    assert [(a.number, a.first) for a in made] == [(b.number, b.first) for b in wanted]
    for a, b in zip(made, wanted, strict=True):
        assert torch.equal(a.latents_BCFHW, b.latents_BCFHW)


@pytest.mark.parametrize(
    ("mode", "at"),
    [(mode, at) for mode in ("planned", "joint") for at in range(1, PASSES[mode] + 1)]
    + [("refreshed", at) for at in range(1, PASSES["refreshed"] + 1, 4)],
)
def test_interrupt_before_any_pass(mode: str, at: int, undisturbed, tmp_path: Path):
    """Law 8: an interrupt before any pass (plan, keyframe write, chunk, context) costs nothing."""
    recording = Recording(tmp_path, MODES[mode])
    trip = recording.stream.before_pass = Trip(at)
    check_goes_on(recording, undisturbed(mode), trip.error, at)
    assert trip.calls <= PASSES[mode] + 3 + 1  # at most a plan is made again


@pytest.mark.parametrize(
    ("mode", "at"),
    [("planned", at) for at in range(1, PASSES["planned"] + 1)]
    + [("joint", at) for at in range(1, PASSES["joint"] + 1, 3)]
    + [("cfg", at) for at in range(1, 2 * PASSES["cfg"] + 1, 7)],  # two forwards a pass
)
def test_interrupt_in_a_layer(mode: str, at: int, undisturbed, tmp_path: Path):
    """Law 8: nor does an exception in the middle of a pass, when a layer has written already."""
    expected, error = undisturbed(mode), ERRORS[at % len(ERRORS)]
    layer = model().denoiser.tree.blocks[1].self_attn.norm_k
    hook = layer.register_forward_hook(Trip(at, error))
    try:
        check_goes_on(Recording(tmp_path, MODES[mode]), expected, error, at)
    finally:
        hook.remove()


def test_interrupt_again_and_again(undisturbed, tmp_path: Path):
    """Law 8: a stream that is interrupted before every second pass still gets to its end."""
    expected = undisturbed("refreshed")
    recording = Recording(tmp_path, MODES["refreshed"])
    rng, interrupts, calls = random.Random(0), 0, 0

    def before_pass() -> None:
        nonlocal calls
        calls += 1
        if calls > 2 and rng.random() < 0.5:  # a plan alone has three passes
            calls = 0
            raise Interrupted

    recording.stream.before_pass = before_pass
    while True:
        try:
            recording.finish()
            break
        except Interrupted:
            interrupts += 1
            assert interrupts < 300
    assert interrupts > 5
    recording.check_equals(expected.recording)


@pytest.mark.parametrize("at", [1, 2, 3, 6, 7, 12, 13])  # one call a latent frame
def test_exception_in_decode(at: int, undisturbed, tmp_path: Path):
    """Law 8: an exception inside the VAE leaves the decoder at the boundary of the chunk."""
    recording = Recording(tmp_path, settings())
    error = ERRORS[at % len(ERRORS)]
    hook = vae().decoder.upsamples[5].register_forward_hook(Trip(at, error))
    try:
        with pytest.raises(type(error)):
            recording.finish()
    finally:
        hook.remove()
    check_boundary(recording.stream, undisturbed("planned"))
    recording.finish().check_equals(undisturbed("planned").recording)


def test_exception_in_the_warming_of_a_decoder():
    """Law 8: a continued stream's decoder is warmed once, also when that is interrupted."""
    source = small_stream()
    source.chunk(2)
    frozen = source.freeze()

    def first_frames(*trips: int) -> Tensor:
        decoder = StreamingDecoder(vae(), latent_frames_per_step=1)
        cursor = FrameCursor(continued(frozen), decoder)
        for at in trips:
            hook = vae().decoder.upsamples[5].register_forward_hook(Trip(at))
            try:
                with pytest.raises(Interrupted):
                    cursor.pull()
            finally:
                hook.remove()
        made = cursor.pull()
        assert made is not None
        return made.frames_BFHWC

    # Five latents warm it, two are the chunk: in the warming, in the chunk, in both.
    expected = first_frames()
    for trips in ((1,), (5,), (6,), (7,), (3, 7, 1, 2)):
        assert torch.equal(first_frames(*trips), expected), trips


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("at", [1, 4])
def test_exception_in_encode(
    at: int, error: BaseException, undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Law 8: an exception while a chunk is encoded leaves the file at the boundary before it."""
    trip, real = Trip(at, error), VideoWriter._packets

    def packets(writer: VideoWriter, *arguments):
        made = real(writer, *arguments)
        trip()
        return made

    monkeypatch.setattr(VideoWriter, "_packets", packets)
    recording = Recording(tmp_path, settings())
    with pytest.raises(type(error)):
        recording.finish()
    assert recording.writer.chunks == len(recording.seen) == at - 1
    check_boundary(recording.stream, undisturbed("planned"))
    recording.finish().check_equals(undisturbed("planned").recording)


def test_exception_in_the_announcement(undisturbed, tmp_path: Path):
    """Law 8: a chunk whose announcement fails is on disk, and is not written again."""
    recording = Recording(tmp_path, settings())
    announce, trip = recording.recorder.on_chunk, Trip(3)

    def announced(made: FrameChunk) -> None:
        announce(made)
        trip()

    recording.recorder.on_chunk = announced
    with pytest.raises(Interrupted):
        recording.finish()
    assert recording.writer.chunks == 3
    recording.finish().check_equals(undisturbed("planned").recording)


def pull_all(source: VideoStream, caught: list[BaseException]) -> None:
    try:
        latents_of(source)
    except BaseException as error:
        caught.append(error)


def test_exception_in_a_worker_thread(undisturbed, tmp_path: Path):
    """Law 8: a thread that dies while it pulls leaves the stream to others, at a boundary."""
    expected = undisturbed("planned")
    for at in (2, 9, 15):
        recording = Recording(tmp_path, settings())
        recording.stream.before_pass = Trip(at)
        caught: list[BaseException] = []
        worker = threading.Thread(target=pull_all, args=(recording.stream, caught))
        worker.start()
        worker.join()
        assert [type(error) for error in caught] == [Interrupted]
        check_boundary(recording.stream, expected)
        recording.finish().check_equals(expected.recording)


def test_interrupt_in_a_replay(undisturbed, tmp_path: Path):
    """Law 8: the context passes that a resumed stream replays can be interrupted as well."""
    expected = latents_of(undisturbed("planned").recording.stream)
    source = small_stream()
    keep_journal(source, tmp_path / "x.journal")
    source.chunk(5)
    source.close()
    journal = (tmp_path / "x.journal").read_bytes()
    # Six context passes, and a plan of three in front of the fifth.
    for at in range(1, 10):
        (tmp_path / "y.journal").write_bytes(journal)
        again = resume(tmp_path / "y.journal", model(), conditioner())
        again.before_pass = Trip(at)
        assert len(again) == 6
        with pytest.raises(Interrupted):
            latents_of(again)
        assert torch.equal(latents_of(again), expected), at
        again.close()


def test_interrupt_before_anything_was_made():
    """Law 8: a stream that never got to its first chunk can be frozen and continued too."""
    expected = latents_of(small_stream(image=False))
    source = small_stream(image=False)
    source.before_pass = Trip(1)
    with pytest.raises(Interrupted):
        source.chunk(0)
    frozen = source.freeze()
    assert (frozen.chunk, frozen.frontier, frozen.frames) == (0, 0, ())
    after = continued(frozen)
    assert FrameCursor(after, StreamingDecoder(vae())).pull() is not None
    assert torch.equal(latents_of(after), expected)


class KeptFrames:
    """Stands in for a video file: remembers what was written."""

    def __init__(self) -> None:
        self.chunks: list[Tensor] = []

    @property
    def frames(self) -> int:
        return sum(len(chunk) for chunk in self.chunks)

    def write(self, frames_FHWC: Tensor) -> None:
        self.chunks.append(frames_FHWC)


def test_interrupt_between_any_two_lines_of_recording():
    """Law 8: an exception out of nowhere (a signal's), between any two lines of the cursor, the
    recorder and the decoder, loses no chunk, repeats none, and changes no frame."""
    source = small_stream()
    chunks = list(source)
    files = {frames.__file__, streaming.__file__}

    def record(at: int) -> tuple[list[Tensor], bool]:
        lines, kept = 0, KeptFrames()
        decoder = StreamingDecoder(vae())
        recorder = Recorder(FrameCursor(source, decoder), cast(VideoWriter, kept))

        def trace(frame: FrameType, event: str, _: object):
            nonlocal lines
            if frame.f_code.co_filename not in files:
                return None
            lines += event == "line"
            if lines == at and event == "line":
                raise Interrupted
            return trace

        hit, going = False, True
        before = sys.gettrace()
        while going:
            sys.settrace(trace)
            try:
                going = recorder.step()
            except Interrupted:
                hit = True
            finally:
                sys.settrace(before)
        return kept.chunks, hit

    expected, _ = record(0)
    assert len(expected) == len(chunks)
    at, hit = 1, True
    while hit:
        made, hit = record(at)
        assert len(made) == len(expected), f"interrupted at line {at}"
        assert all(map(torch.equal, made, expected)), f"interrupted at line {at}"
        at += 11
    assert at > 50
