"""Interrupting a recording at any point, and what must hold after.

`Trip` raises, `Recording` can be stepped on, and `check_boundary` compares with an undisturbed run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from sneakpeek_core.frames import FrameChunk, FrameCursor, Recorder
from sneakpeek_core.frozen import FrozenCache
from sneakpeek_core.mp4 import probe
from sneakpeek_core.settings import SamplerSettings
from sneakpeek_core.stream import Chunk, VideoStream
from sneakpeek_core.vae.streaming import StreamingDecoder
from sneakpeek_core.video import VideoWriter
from tests.laws import FPS, continued, small_stream, vae
from tests.small import GUIDANCE, JOINT, SIZE, latents_of, settings


class Interrupted(BaseException):
    """As a host interrupts: an exception that `except Exception` does not see."""


ERRORS = (RuntimeError("broken"), KeyboardInterrupt(), Interrupted())


class Trip:
    """Raises once, at its n-th call; counts from 1, and never at 0."""

    def __init__(self, at: int, error: BaseException | None = None):
        self.at = at
        self.calls = 0
        self.error = error or Interrupted()

    def __call__(self, *_: object) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise self.error


class Recording:
    """A stream, decoded and written to a file, that can be stepped on after any exception."""

    def __init__(self, folder: Path, options: SamplerSettings):
        self.stream = small_stream(options)
        self.seen: list[FrameChunk] = []
        self.path = folder / f"{len(list(folder.iterdir()))}.mp4"
        self.writer = VideoWriter(self.path, width=SIZE, height=SIZE, fps=FPS)
        decoder = StreamingDecoder(vae(), latent_frames_per_step=1)
        cursor = FrameCursor(self.stream, decoder)
        self.recorder = Recorder(cursor, self.writer, self.seen.append)

    def finish(self) -> Recording:
        while self.recorder.step():
            pass
        return self

    def chunks(self) -> list[Chunk]:
        return [made.chunk for made in self.seen]

    def check_equals(self, other: Recording) -> None:
        """The same chunks, each once, the same frames and the same file."""
        assert [made.chunk.number for made in self.seen] == list(range(len(other.seen)))
        for mine, wanted in zip(self.seen, other.seen, strict=True):
            assert mine.first == wanted.first
            assert torch.equal(mine.chunk.latents_BCFHW, wanted.chunk.latents_BCFHW)
            assert torch.equal(mine.frames_BFHWC, wanted.frames_BFHWC)
        assert probe(self.path).frames == self.stream.timeline.frames == 49
        assert self.path.read_bytes() == other.path.read_bytes()


class Undisturbed(NamedTuple):
    recording: Recording
    boundaries: list[FrozenCache]  # after each chunk
    passes: int


MODES = {
    "planned": settings(),
    "joint": settings(guidance=JOINT),
    "refreshed": settings(guidance=replace(GUIDANCE, refresh=2)),
    "cfg": settings(cfg=2.0),
}
# Chunks of two passes and a context pass, the start image's and none behind the last chunk; a
# plan is two passes and one that writes it: at the start, when frame 6 is reached, at refreshes.
PASSES = {
    "planned": 6 * 3 + 2 * 3,
    "joint": 6 * 3,
    "refreshed": 6 * 3 + 4 * 3,
    "cfg": 6 * 3 + 2 * 3,
}


def undisturbed_runs(folders: pytest.TempPathFactory) -> Callable[[str], Undisturbed]:
    """Return what makes the undisturbed run of a mode, once."""

    @cache
    def run(mode: str) -> Undisturbed:
        options = MODES[mode]
        recording = Recording(folders.mktemp("undisturbed"), options)
        count = Trip(0)
        recording.stream.before_pass = count
        recording.finish()
        source, boundaries = small_stream(options), []
        for _ in source:
            boundaries.append(source.freeze())
        return Undisturbed(recording, boundaries, count.calls)

    return run


def check_boundary(source: VideoStream, expected: Undisturbed) -> None:
    """After an exception the stream can be frozen at a boundary, and that goes on as it should.

    The keyframes in force may be newer than the boundary, or lost with an interrupted plan.
    """
    frozen, wanted = source.freeze(), expected.boundaries[len(source) - 1]
    assert (frozen.chunk, frozen.frontier, frozen.frames) == (
        wanted.chunk, wanted.frontier, wanted.frames,
    )  # fmt: skip
    same_plan = (frozen.future, frozen.planned_at) == (wanted.future, wanted.planned_at)
    skip = (0, 0) if same_plan else (len(frozen.future), len(wanted.future))
    for mine, other in zip(
        (*frozen.keys, *frozen.values), (*wanted.keys, *wanted.values), strict=True
    ):
        assert torch.equal(mine[:, :, skip[0] :], other[:, :, skip[1] :])
    assert torch.equal(frozen.warm, wanted.warm)
    if frozen.frontier < source.timeline.latent_frames:
        rest = [made.chunk.latents_BCFHW for made in expected.recording.seen[len(source) :]]
        assert torch.equal(latents_of(continued(frozen)), torch.cat(rest, dim=2))
