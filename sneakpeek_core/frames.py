"""Frames of a stream, and the loop that records them. Nothing here knows that sigmas exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from .contact_sheet import StepFrames
from .shapes import frames_of
from .stream import Chunk, VideoStream
from .video import VideoWriter


class FrameDecoder(Protocol):
    """Turns latents into frames, going on from call to call.

    A call that raises must leave the decoder as it was.
    """

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Return frames BFHWC in [0, 1]: one for the first latent frame ever, else four each."""
        ...


class FrameChunk(NamedTuple):
    """The decoded frames of one chunk."""

    chunk: Chunk
    first: int  # frame number in the video
    frames_BFHWC: Tensor  # float32 in [0, 1], on the decoder's device


class FrameCursor:
    """Decodes a stream from its beginning, chunk by chunk, on demand.

    `pull` can be called again after any exception: it goes on with the chunk it was at. The
    decoder of a continued stream is warmed with the latents before its first chunk; their frames
    belong to the video before and are dropped.
    """

    def __init__(self, stream: VideoStream, decoder: FrameDecoder):
        self.stream = stream
        self.decoder = decoder
        self._number = 0
        self._warm = stream.warm

    def pull(self) -> FrameChunk | None:
        """Return the next chunk's frames, or None behind the end."""
        chunk = self.stream.chunk(self._number)
        if chunk is None:
            return None
        if self._warm is not None and self._warm.shape[2]:
            self.decoder.decode(self._warm)
        self._warm = None
        frames = self.decoder.decode(chunk.latents_BCFHW)
        self._number += 1
        return FrameChunk(chunk, frames_of(chunk.first), frames)


class Recorder:
    """Writes a stream to a file while it is made; one `step` a chunk.

    After an exception in sampling, decoding or writing, `step` can be called again: the chunk it
    was at is finished, and none is written twice.
    """

    def __init__(
        self,
        cursor: FrameCursor,
        writer: VideoWriter,
        on_chunk: Callable[[FrameChunk], None] = lambda _: None,
    ):
        self.cursor = cursor
        self.writer = writer
        self.on_chunk = on_chunk
        self._waiting: FrameChunk | None = None  # decoded, not written yet

    def step(self) -> bool:
        """Make, decode and write one more chunk, then announce it; False behind the end."""
        if self._waiting is None:
            self._waiting = self.cursor.pull()
        if self._waiting is None:
            return False
        self.writer.write(self._waiting.frames_BFHWC[0])
        written, self._waiting = self._waiting, None
        self.on_chunk(written)
        return True


def step_ranges(stream: VideoStream) -> list[tuple[str, int, int]]:
    """Return (text, first, end) in frames for every step that this stream shows something of."""
    begin = frames_of(stream.first)
    ranges = []
    for index, step in enumerate(stream.schedule.steps):
        first, end = stream.timeline.frame_range(index)
        if end > begin:
            ranges.append((f"{index + 1}. {step.text}", max(first, begin), end))
    return ranges


class StepSheet:
    """Collects the contact sheet's frames of a stream, live edits included."""

    def __init__(self, stream: VideoStream):
        self._stream = stream
        self._seen = stream.conditioning.version
        self.frames = StepFrames(step_ranges(stream))

    def add(self, made: FrameChunk) -> None:
        if self._stream.conditioning.version != self._seen:
            self._seen = self._stream.conditioning.version
            self.frames.update(step_ranges(self._stream))
        self.frames.add(made.first, made.frames_BFHWC[0])
