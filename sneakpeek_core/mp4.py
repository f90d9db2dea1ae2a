"""What is read back from MP4 files, and how a stream's file becomes an ordinary one.

A file that a killed process left may end in a torn fragment: everything here reads it as if it
ended before that.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
from av.container import InputContainer
from av.error import FFmpegError

from .whole_file import whole_file

WRITTEN_BY_MUXER = {"major_brand", "minor_version", "compatible_brands", "encoder"}


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """What a file holds; of a torn file, its whole fragments."""

    frames: int
    width: int
    height: int
    fps: float
    seconds: float
    codec: str  # FFmpeg's name: h264, hevc, vp9, av1
    key_frames: tuple[int, ...]  # frame numbers
    metadata: Mapping[str, str] = field(default_factory=dict)


def probe(path: str | os.PathLike[str]) -> VideoFacts:
    """Read the facts of the video file at `path`; `ValueError` when it is none."""
    with _opened(Path(path)) as container:
        stream = container.streams.video[0]
        frames, end, keys = 0, Fraction(0), []
        for packet in _packets_of(container):
            if packet.is_keyframe:
                keys.append(frames)
            frames += 1
            end = max(end, ((packet.pts or 0) + (packet.duration or 0)) * packet.time_base)
        rate = stream.average_rate or (frames / end if end else Fraction(0))
        return VideoFacts(
            frames=frames,
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            fps=float(rate),
            seconds=float(end),
            codec=stream.codec_context.codec.canonical_name,
            key_frames=tuple(keys),
            metadata=_own_tags(container),
        )


def remux_fast_start(
    path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Rewrite the file as a fast-start MP4 without re-encoding, `metadata` added to its tags.

    Also for a file that a killed process left: a torn last fragment is dropped. The new file
    replaces the old one only when it is complete; on any error (`OSError`, `ValueError`,
    FFmpeg's own) the old one is untouched.
    """
    path = Path(path).absolute()
    with whole_file(path) as part:
        frames = _copy(path, part, metadata or {})
        if probe(part).frames != frames:  # the muxer of PyAV 14 can lose packets silently
            raise OSError(f"the rewritten {path} does not hold all {frames} frames")
        with open(part, "r+b") as file:
            os.fsync(file.fileno())


def _copy(path: Path, part: Path, metadata: Mapping[str, str]) -> int:
    frames = 0
    # without the bit rate box, whose rounding depends on the file that is read
    options = {"movflags": "use_metadata_tags+faststart", "write_btrt": "0"}
    with _opened(path) as source:
        video = source.streams.video[0]
        # PyAV 14 would count in 1/90000 s, in which 23.976 frames a second are uneven
        options["video_track_timescale"] = str(Fraction(video.time_base or 1).denominator)
        with av.open(str(part), "w", format="mp4", options=options) as target:
            target.metadata.update(_own_tags(source) | dict(metadata))
            # opaque: without it an encoder of this codec is opened, and may replace the parameters
            stream = target.add_stream_from_template(video, opaque=True)
            stream.codec_context.codec_tag = video.codec_context.codec_tag
            for packet in _packets_of(source):
                packet.stream = stream
                target.mux(packet)
                frames += 1
    return frames


def boxes(file: io.BufferedIOBase) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, end) of the top-level boxes of an MP4 that are there to their end."""
    size, start = file.seek(0, os.SEEK_END), 0
    while start + 8 <= size:
        file.seek(start)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:  # a 64-bit length follows the kind
            length = int.from_bytes(head[8:16], "big")
        elif length == 0:  # to the end of the file
            length = size - start
        if length < 8 or start + length > size:
            return
        yield head[4:8], start, start + length
        start += length


class _WholeFragments:
    """An open MP4 as FFmpeg reads it, ending before the first torn fragment."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._size = max((end for kind, _, end in boxes(file) if kind != b"moof"), default=0)
        file.seek(0)

    def read(self, size: int) -> bytes:
        return self._file.read(max(0, min(size, self._size - self.tell())))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            return self._file.seek(offset + self._size)
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    with open(path, "rb") as file:
        try:
            container = av.open(_WholeFragments(file), "r")
        except FFmpegError as error:
            raise ValueError(f"{path} is not an MP4 video: {error}") from error
        with container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video")
            yield container


def _packets_of(container: InputContainer) -> Iterator[av.Packet]:
    """Yield the video packets in decoding order."""
    return (packet for packet in container.demux(container.streams.video[0]) if packet.size)


def _own_tags(container: InputContainer) -> dict[str, str]:
    return {k: v for k, v in container.metadata.items() if k not in WRITTEN_BY_MUXER}
