"""Frames of a stream, and the loop that records them. Nothing here knows that sigmas exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .contact_sheet import StepFrames
from .shapes import frames_of
from .stream import Chunk, VideoStream
from .video import VideoWriter


class FrameDecoder(Protocol):
    """Turns latents into frames, going on from call to call.

    `state` is where it is: setting it back to an earlier value goes back there.
    """

    state: Any

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Return frames BFHWC in [0, 1]: one for the first latent frame ever, else four each."""
        ...


class FrameChunk(NamedTuple):
    """The decoded frames of one chunk."""

    chunk: Chunk
    first: int  # frame number in the video
    frames_BFHWC: Tensor  # float32 in [0, 1], on the decoder's device


class _At(NamedTuple):
    """Where a cursor is: all of it, so that one assignment moves it."""

    number: int  # of the chunk it is at
    state: Any  # of the decoder in front of that chunk
    made: FrameChunk | None  # that chunk, once it is decoded


class FrameCursor:
    """Decodes a stream from its beginning, chunk by chunk, on demand.

    Whatever is raised, and wherever, a cursor stays at its chunk and can be asked again. The
    decoder of a continued stream is warmed with the latents before its first chunk; their frames
    belong to the video before and are dropped.
    """

    def __init__(self, stream: VideoStream, decoder: FrameDecoder):
        self.stream = stream
        self.decoder = decoder
        self._at = _At(0, decoder.state, None)

    def peek(self) -> FrameChunk | None:
        """Return the frames of the chunk it is at, decoding them once; None behind the end."""
        number, state, made = self._at
        if made is not None:
            return made
        chunk = self.stream.chunk(number)
        if chunk is None:
            return None
        self.decoder.state = state
        warm = self.stream.warm
        if number == 0 and warm is not None and warm.shape[2]:
            self.decoder.decode(warm)
        frames = self.decoder.decode(chunk.latents_BCFHW)
        made = FrameChunk(chunk, frames_of(chunk.first), frames)
        self._at = _At(number, state, made)
        return made

    def advance(self) -> None:
        """Go on to the next chunk; what `peek` returned is let go."""
        if self._at.made is not None:
            self._at = _At(self._at.number + 1, self.decoder.state, None)

    def pull(self) -> FrameChunk | None:
        """Return the next chunk's frames and go on, or None behind the end."""
        made = self.peek()
        self.advance()
        return made


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
        self._begin = frames_of(cursor.stream.first) - writer.frames

    def step(self) -> bool:
        """Make, decode and write one more chunk, then announce it; False behind the end."""
        made = self.cursor.peek()
        if made is None:
            return False
        if self.writer.frames == made.first - self._begin:  # else an interrupt came after writing
            self.writer.write(made.frames_BFHWC[0])
        self.cursor.advance()
        self.on_chunk(made)
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
