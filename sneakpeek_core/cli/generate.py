"""`sneakpeek generate`: a file of steps in, a video out while it is made; stop it, and go on."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import sys
from collections.abc import Iterator

from ..contact_sheet import save_contact_sheet
from ..frames import FrameChunk, FrameCursor, Recorder, StepSheet
from ..shapes import frames_of
from ..stream import VideoStream
from ..vae.streaming import StreamingDecoder
from .endings import Interrupted, ending, on_one_line
from .jobs import Job, fresh, resumed
from .progress import Progress
from .watch import StepsWatcher


def run(options: argparse.Namespace) -> int:
    """Check everything, then stream. Returns 0; 1 or 130 when it stopped on the way."""
    job = resumed(options) if options.resume else fresh(options)
    progress, sheet = Progress(job.stream), StepSheet(job.stream)
    try:
        with job.replacing():
            _stream(job, progress, sheet)
        _finish(job, sheet)
    except (Exception, KeyboardInterrupt) as error:
        progress.end()
        code, words = ending(error)
        _say(on_one_line(words))
        _leave(job, freeze=not isinstance(error, KeyboardInterrupt))
        return code
    return 0


def _stream(job: Job, progress: Progress, sheet: StepSheet) -> None:
    """Make, decode and write chunk after chunk."""

    def announce(made: FrameChunk) -> None:
        if job.contact_sheet:  # it keeps full frames of every step
            sheet.add(made)
        progress.chunk(made)

    decoder = StreamingDecoder(job.vae, latent_frames_per_step=job.stream.settings.chunk)
    recorder = Recorder(FrameCursor(job.stream, decoder), job.writer, announce)
    with _stoppable(job.stream), StepsWatcher(job.stream, job.watched, job.before):
        while recorder.step():
            pass
    progress.end()


def _finish(job: Job, sheet: StepSheet) -> None:
    """Turn the stream's file into the finished video, with what was asked for beside it."""
    if job.save_cache:
        job.stream.freeze().save(job.save_cache)
        _say(f"cache: {job.save_cache}, to go on with --continue-from {job.save_cache}")
    if job.contact_sheet:
        save_contact_sheet(job.contact_sheet, sheet.frames.rows())
        _say(f"contact sheet: {job.contact_sheet}")
    if not job.writer.close(job.metadata()):
        raise OSError(f"{job.writer.path} could not be finished")
    job.stream.close()
    job.journal.unlink(missing_ok=True)
    seconds = job.writer.frames / job.stream.conditioner.fps
    _say(f"video: {job.writer.path}, {job.writer.frames} frames, {seconds:.2f} s")


def _leave(job: Job, *, freeze: bool) -> None:
    """Close a video that is not finished, and say what there is of it and how to go on."""
    job.writer.abort()
    if not len(job.stream):
        job.stream.close()
        job.journal.unlink(missing_ok=True)
        return
    seconds = frames_of(job.stream.made) / job.stream.conditioner.fps
    if job.writer.frames:
        _say(f"{job.writer.path} plays as it is")
    _say(
        f"{seconds:.2f} s are kept; go on with: "
        f"sneakpeek generate --resume {shlex.quote(str(job.writer.path))}"
    )
    if freeze and job.save_cache:
        with contextlib.suppress(Exception):  # out of memory, disk full: the journal still holds
            job.stream.freeze().save(job.save_cache)
            _say(f"cache: {job.save_cache}")
    job.stream.close()


@contextlib.contextmanager
def _stoppable(stream: VideoStream) -> Iterator[None]:
    """Let Ctrl-C stop the stream between two passes; a second one ends the program at once."""
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check() -> None:
        if asked:
            raise Interrupted

    before = signal.signal(signal.SIGINT, ask)
    stream.before_pass = check
    try:
        yield
        check()
    finally:
        stream.before_pass = lambda: None
        signal.signal(signal.SIGINT, before)


def _say(words: str) -> None:
    print(words, file=sys.stderr)
