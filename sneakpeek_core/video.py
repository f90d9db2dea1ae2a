"""The video file that grows while it is generated.

Every chunk is encoded by a fresh encoder, drained, and appended as one whole fragment (moof and
mdat), so a chunk begins with a key frame, nothing waits inside a codec between chunks, and a killed
process leaves a file that plays up to the last written chunk. Pixels are FHWC (frames, height,
width, RGB), uint8 or float in [0, 1]; files are 4:2:0, BT.709, limited range.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import cast

import av
import numpy as np
import torch
from av.container import OutputContainer
from av.error import FFmpegError
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from .mp4 import boxes, remux_fast_start
from .whole_file import whole_file

logger = logging.getLogger(__name__)

BT709 = 1  # the code of BT.709 for matrix, primaries and transfer alike
LIMITED = 1  # 16..235, what players assume
KEYFRAME_DISTANCE = 1 << 14  # frames; no chunk is that long, so only its first frame is a key

# frag_discont lets a fresh muxer start at the chunk's own time and fragment_index at its number;
# timestamps must be left alone for that, or the muxer shifts every chunk back to zero.
FRAGMENT = {
    "movflags": "empty_moov+frag_keyframe+default_base_moof+frag_discont+skip_trailer",
    "avoid_negative_ts": "disabled",
}


@dataclass(frozen=True, kw_only=True)
class Codec:
    """How one codec is asked for: no B-frames, no lookahead, the same bytes on every machine."""

    encoder: str
    crf: int  # default quality, smaller is better
    max_crf: int
    options: Mapping[str, str]
    min_side: int = 2  # pixels, even (older SVT-AV1 refuses less than 64)
    tag: str | None = None  # sample entry, where the muxer's default does not play everywhere
    numbers_idr: bool = False  # neighbouring IDR frames must differ in idr_pic_id (H.264 7.4.3)


# Thread counts are fixed because slicing by core count would change the bytes. x264 runs frame
# threads: their delay ends with the chunk, and the bytes are those of one thread.
CODECS: Mapping[str, Codec] = MappingProxyType(
    {
        "h264": Codec(
            encoder="libx264",
            crf=18,
            max_crf=51,
            options={
                "preset": "veryfast",
                "tune": "zerolatency",
                "forced-idr": "1",
                "x264-params": "threads=4:sliced-threads=0:scenecut=0",
            },
            numbers_idr=True,
        ),
        "h265": Codec(
            encoder="libx265",
            crf=20,
            max_crf=51,
            options={
                "preset": "ultrafast",
                "tune": "zerolatency",
                "x265-params": "pools=none:frame-threads=1:scenecut=0:log-level=none",
            },
            tag="hvc1",  # Apple players refuse hev1
        ),
        "vp9": Codec(
            encoder="libvpx-vp9",
            crf=24,
            max_crf=63,
            options={
                "deadline": "realtime",
                "cpu-used": "8",
                "lag-in-frames": "0",
                "auto-alt-ref": "0",
                "b": "0",
            },
        ),
        "av1": Codec(
            encoder="libsvtav1",
            crf=18,
            max_crf=63,
            options={"preset": "8", "svtav1-params": "pred-struct=1:lp=2:scd=0"},
            min_side=64,
        ),
    }
)


def available_codecs() -> tuple[str, ...]:
    """Return the names in `CODECS` whose encoder this FFmpeg build has."""
    return tuple(name for name, codec in CODECS.items() if codec.encoder in av.codecs_available)


def to_uint8(frames: Tensor) -> Tensor:
    """Return `frames` as uint8 on their own device; uint8 passes, [0, 1] is clamped and rounded.

    The arithmetic is float32 whatever the input: 255 * x in bfloat16 would round twice.
    """
    if frames.dtype == torch.uint8:
        return frames
    return frames.float().clamp(0, 1).mul_(255).round_().to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class _Boundary:
    """Where the file stands after a whole chunk."""

    bytes: int = 0
    frames: int = 0
    chunks: int = 0
    lone_idr: bool = False  # the last chunk is one frame whose idr_pic_id is 0


class VideoWriter:
    """Write chunks of frames to a fragmented MP4; a context manager.

    `write` either puts a whole chunk on disk or, whatever it raises, changes nothing, so the same
    chunk can be written again. `close` turns the file into an ordinary fast-start MP4; leaving the
    `with` block does that too, or `abort`s when an exception passes through.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        width: int,
        height: int,
        fps: float | Fraction,
        codec: str = "h264",
        crf: int | None = None,
        overwrite: bool = False,
    ) -> None:
        """Check everything and create nothing: the file appears with the first chunk.

        `width` and `height` are even pixels. `crf` is the quality, None the codec's default.
        Raises `ValueError` naming the setting and the fix.
        """
        self.path = _checked_path(Path(path), overwrite)
        self._codec = _checked_codec(codec)
        self._crf = _checked_crf(self._codec, codec, crf)
        least = self._codec.min_side
        for name, value in (("width", width), ("height", height)):
            if value < least or value % 2:
                fix = max(least, value + value % 2)
                raise ValueError(f"{name} {value} is not even and {least} or more; use {fix}")
        if not 0 < fps <= 1000:
            raise ValueError(f"fps {fps} is not above 0 and at most 1000; use 16")
        self._width, self._height = width, height
        self._fps = Fraction(fps).limit_denominator(1001)
        self._at = _Boundary()
        self._open = True

    @property
    def frames(self) -> int:
        """Frames in the file: those of whole chunks."""
        return self._at.frames

    @property
    def chunks(self) -> int:
        """Chunks in the file."""
        return self._at.chunks

    def write(self, frames_FHWC: Tensor) -> None:
        """Append one chunk, uint8 or float in [0, 1]; on return all of it is with the system.

        Raises `ValueError` on a wrong shape or NaN, `OSError` on a full disk; file and writer are
        then still at the previous chunk boundary.
        """
        if not self._open:
            raise ValueError(f"{self.path} is closed; make a new VideoWriter to write more")
        self._check_frames(frames_FHWC)
        frames = to_uint8(frames_FHWC.detach()).cpu().contiguous().numpy()
        before = self._at
        chunk = self._encode(frames)
        try:
            self._put(chunk)
            self._at = _Boundary(
                bytes=before.bytes + len(chunk),
                frames=before.frames + len(frames),
                chunks=before.chunks + 1,
                lone_idr=len(frames) == 1 and not before.lone_idr,
            )
        except BaseException:  # also an interrupt: the file must not keep a part
            self._at = before
            if before.bytes:
                with contextlib.suppress(OSError):  # the next write cuts again
                    os.truncate(self.path, before.bytes)
            raise

    def close(self, metadata: Mapping[str, str] | None = None) -> bool:
        """Finish the file: fast start, with `metadata` as one tag per key; True when that worked.

        When it did not (disk full), a warning is logged and the fragmented file stays: it plays,
        and `remux_fast_start` can be called on it later. A second call does nothing.
        """
        if not self._open:
            return False
        self._open = False
        if not self._at.chunks:
            return False
        try:
            remux_fast_start(self.path, metadata)
        except (OSError, FFmpegError, ValueError) as error:
            logger.warning("%s stays fragmented and has no metadata: %s", self.path, error)
            return False
        return True

    def abort(self) -> None:
        """Stop here: the file stays as it is, playable up to the last chunk."""
        self._open = False

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _check_frames(self, frames_FHWC: Tensor) -> None:
        shape, want = tuple(frames_FHWC.shape), (self._height, self._width, 3)
        if len(shape) != 4 or shape[1:] != want or not shape[0]:
            raise ValueError(f"a chunk has shape {shape}; it must be (1 or more, *{want})")
        if frames_FHWC.dtype == torch.uint8:
            return
        if not frames_FHWC.is_floating_point():
            raise ValueError(f"a chunk is {frames_FHWC.dtype}; it must be uint8 or float in [0, 1]")
        if bool(frames_FHWC.amax().isnan()):
            raise ValueError(f"a chunk holds NaN; the file ends before it, at frame {self.frames}")

    def _encode(self, frames: np.ndarray) -> bytes:
        """Return the bytes to append for one chunk; touches neither the file nor the writer."""
        buffer = io.BytesIO()
        options = FRAGMENT | {"fragment_index": str(self._at.chunks + 1)}
        with av.open(buffer, "w", format="mp4", options=options) as container:
            stream = self._add_stream(container)
            for packet in self._packets(stream, frames):
                container.mux(packet)
        fresh = buffer.getvalue()
        wanted = {b"moof", b"mdat"} if self._at.chunks else {b"ftyp", b"moov", b"moof", b"mdat"}
        found = boxes(io.BytesIO(fresh))
        parts = [fresh[start:end] for kind, start, end in found if kind in wanted]
        assert len(parts) == len(wanted), "one chunk must be one fragment"
        return b"".join(parts)

    def _add_stream(self, container: OutputContainer) -> VideoStream:
        if self._codec.encoder == "libsvtav1":
            # Its banner, 20 lines an encoder, cannot be turned off in any other way.
            os.environ.setdefault("SVT_LOG", "1")
        options = {**self._codec.options, "crf": str(self._crf)}
        stream = cast(
            VideoStream, container.add_stream(self._codec.encoder, rate=self._fps, options=options)
        )
        stream.width, stream.height, stream.pix_fmt = self._width, self._height, "yuv420p"
        context = stream.codec_context
        context.gop_size = KEYFRAME_DISTANCE
        context.thread_count = 1  # the options above say where there are more
        context.color_range = LIMITED
        context.colorspace = context.color_primaries = context.color_trc = BT709
        if self._codec.tag:
            context.codec_tag = self._codec.tag
        return stream

    def _packets(self, stream: VideoStream, frames: np.ndarray) -> list[av.Packet]:
        """Encode a chunk to its end, timed by the number of each frame in the whole file."""
        first, context, reformatter = self._at.frames, stream.codec_context, VideoReformatter()
        # A fresh x264 numbers its first IDR 0. After a lone frame numbered 0 too, the first frame
        # is encoded twice and the first copy dropped, which leaves number 1.
        again = int(self._codec.numbers_idr and self._at.lone_idr)
        packets: list[av.Packet] = []
        for number in range(first - again, first + len(frames)):
            frame = _yuv_frame(reformatter, frames[max(0, number - first)])
            frame.pts, frame.time_base = number, 1 / self._fps
            if number == first:
                frame.pict_type = PictureType.I
            packets += context.encode(frame)
        packets += context.encode(None)
        assert len(packets) == again + len(frames), "the encoder dropped or added a frame"
        return packets[again:]

    def _put(self, chunk: bytes) -> None:
        at = self._at.bytes
        if at:
            if self.path.stat().st_size < at:
                raise OSError(f"{self.path} was changed by another program while it was written")
            _append(self.path, at, chunk)
            return
        # The first chunk arrives whole or not at all, and replaces an old file only then.
        with whole_file(self.path) as part, open(part, "wb", buffering=0) as file:
            _write_all(file, chunk)


def _checked_path(path: Path, overwrite: bool) -> Path:
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"{path} does not end in .mp4; use {path.with_suffix('.mp4').name}")
    if not path.parent.is_dir():
        raise ValueError(f"folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file in it")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another name or pass overwrite=True")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"folder {path.parent} cannot be written to; choose another one")
    return path.absolute()


def _checked_codec(name: str) -> Codec:
    if name not in available_codecs():
        what = "is not in this FFmpeg build" if name in CODECS else "is unknown"
        raise ValueError(f"codec {name!r} {what}; available: {', '.join(available_codecs())}")
    return CODECS[name]


def _checked_crf(codec: Codec, name: str, crf: int | None) -> int:
    if crf is None:
        return codec.crf
    if not 1 <= crf <= codec.max_crf:
        raise ValueError(f"crf {crf} is not in 1..{codec.max_crf} for {name}; use {codec.crf}")
    return crf


def _yuv_frame(reformatter: VideoReformatter, picture_HWC: np.ndarray) -> VideoFrame:
    return reformatter.reformat(
        VideoFrame.from_ndarray(picture_HWC, format="rgb24"),
        format="yuv420p",
        src_colorspace=Colorspace.ITU709,
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
    )


def _append(path: Path, at: int, fragment: bytes) -> None:
    # Readers give up on a torn moof but skip a torn free box: the fragment bears that name until
    # all of it is there, so the file plays whenever the process dies.
    with open(path, "r+b", buffering=0) as file:
        file.truncate(at)
        file.seek(at)
        _write_all(file, fragment[:4] + b"free" + fragment[8:])
        file.seek(at + 4)
        _write_all(file, b"moof")


def _write_all(file: io.FileIO, content: bytes) -> None:
    rest = memoryview(content)
    while rest:  # one call may take a part only
        rest = rest[file.write(rest) :]
