"""Progress in a terminal: one line that renews itself, or a line a chunk where that is no use."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from ..frames import FrameChunk
from ..shapes import frames_of
from ..stream import VideoStream


class Progress:
    """Announces chunks: which of how many, frames per second, and the step's text."""

    def __init__(self, stream: VideoStream, out: TextIO | None = None):
        self._stream = stream
        self._out = out or sys.stderr
        self._live = self._out.isatty()
        self._began = time.monotonic()
        self._frames = 0

    def chunk(self, made: FrameChunk) -> None:
        """Announce a chunk that is on disk."""
        self._frames += made.frames_BFHWC.shape[1]
        stream, chunk = self._stream, made.chunk
        seconds = max(time.monotonic() - self._began, 1e-9)
        size = stream.settings.chunk
        left = max(0, stream.timeline.latent_frames - chunk.first - chunk.latents_BCFHW.shape[2])
        total = frames_of(stream.timeline.latent_frames)
        self._line(
            f"chunk {chunk.number + 1}/{chunk.number + 1 - (-left // size)}  "
            f"{made.first + made.frames_BFHWC.shape[1]}/{total} frames  "
            f"{self._frames / seconds:.1f} frames/s  "
            f"[{chunk.step + 1}/{len(stream.schedule.steps)}] {_short(chunk.text)}"
        )

    def end(self) -> None:
        """Leave the line that renewed itself."""
        if self._live:
            print(file=self._out)

    def _line(self, text: str) -> None:
        end = "\r" if self._live else "\n"
        print(("\x1b[2K" if self._live else "") + text, end=end, file=self._out, flush=True)


def _short(text: str, length: int = 48) -> str:
    shown = "".join(c if c.isprintable() else " " for c in text)
    return shown if len(shown) <= length else shown[: length - 3] + "..."
