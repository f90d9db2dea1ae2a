"""Promises of the growing video file: whole chunks or nothing, playable at any moment."""

from __future__ import annotations

import errno
import gc
import logging
import os
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from sneakpeek_core import video
from sneakpeek_core.mp4 import probe, remux_fast_start
from sneakpeek_core.video import CODECS, VideoWriter, available_codecs, to_uint8
from tests.moving_picture import HEIGHT, WIDTH, decoded, moving, psnr, write_chunks, writer


@pytest.mark.parametrize("codec", available_codecs())
def test_every_chunk_is_on_disk_when_write_returns(tmp_path: Path, codec: str) -> None:
    """Frames, times, key frames and pixels are right after every chunk, without a close."""
    path, chunks = tmp_path / "a.mp4", [1, 12, 4, 1, 1, 12]
    frames, stream, done = moving(sum(chunks)), writer(path, codec=codec), 0
    for chunk in frames.split(chunks):
        stream.write(chunk)
        done += len(chunk)
        assert stream.frames == probe(path).frames == done
    stream.abort()
    pictures, pts, keys, kinds = decoded(path)
    assert len(pictures) == len(frames) and "B" not in kinds
    assert len(set(np.diff(pts))) == 1 and pts[0] == 0 and pts[1] > 0
    assert [i for i, key in enumerate(keys) if key] == [0, 1, 13, 17, 18, 19]
    assert min(psnr(p[None], f[None]) for p, f in zip(pictures, frames, strict=True)) > 35
    facts = probe(path)
    assert facts.key_frames == (0, 1, 13, 17, 18, 19)
    assert (facts.width, facts.height, facts.fps) == (WIDTH, HEIGHT, 16)
    assert facts.seconds == pytest.approx(len(frames) / 16)
    assert facts.codec == {"h265": "hevc"}.get(codec, codec)


@pytest.mark.parametrize("codec", available_codecs())
def test_same_frames_same_bytes(tmp_path: Path, codec: str) -> None:
    """The file is a function of the frames and the chunks."""
    files = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for file in files:
        write_chunks(file, [1, 7], codec=codec)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("codec", available_codecs())
@pytest.mark.parametrize("size", [(16, 16), (48, 32), (34, 18)])
def test_small_sizes_work(tmp_path: Path, codec: str, size: tuple[int, int]) -> None:
    """Nothing below an encoder's block size breaks the file."""
    width, height = (max(side, CODECS[codec].min_side) for side in size)
    with writer(tmp_path / "a.mp4", width=width, height=height, codec=codec) as stream:
        stream.write(moving(2, width, height))
    assert probe(tmp_path / "a.mp4").frames == 2


@pytest.mark.parametrize("color", [(255, 0, 0), (0, 255, 0), (20, 60, 200), (255, 255, 255)])
def test_flat_colours_come_back(tmp_path: Path, color: tuple[int, int, int]) -> None:
    """BT.709 limited range both ways: within 3 levels in every channel."""
    frame = torch.tensor(color, dtype=torch.uint8).expand(3, HEIGHT, WIDTH, 3)
    with writer(tmp_path / "a.mp4") as stream:
        stream.write(frame)
    pictures, *_ = decoded(tmp_path / "a.mp4")
    assert np.abs(pictures.astype(int) - np.array(color)).max() <= 3


def test_frame_rates_stay_even(tmp_path: Path) -> None:
    """A fractional rate keeps its even spacing through the fragments and the remux."""
    with writer(tmp_path / "a.mp4", fps=24000 / 1001) as stream:
        for chunk in moving(30).split(7):
            stream.write(chunk)
    _, pts, _, _ = decoded(tmp_path / "a.mp4")
    assert len(set(np.diff(pts))) == 1
    assert probe(tmp_path / "a.mp4").fps == pytest.approx(24000 / 1001, abs=1e-3)


def idr_numbers(path: Path) -> list[int]:
    """Read idr_pic_id of every IDR slice of an H.264 file: the fourth or fifth field."""
    numbers = []
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            data, at = bytes(packet), 0
            while at < len(data):
                size = int.from_bytes(data[at : at + 4], "big")
                if data[at + 4] & 31 == 5:
                    bits = "".join(f"{byte:08b}" for byte in data[at + 5 : at + 15])
                    fields, place = [], 0
                    for index in range(5):
                        if index == 3:  # frame_num: u(4) as x264 writes it here, 0 in an IDR
                            place += 4
                            continue
                        zeros = bits.index("1", place) - place
                        fields.append(int(bits[place + zeros : place + 2 * zeros + 1], 2) - 1)
                        place += 2 * zeros + 1
                    numbers.append(fields[-1])
                at += 4 + size
    return numbers


def test_neighbouring_idr_frames_have_different_numbers(tmp_path: Path) -> None:
    """H.264 7.4.3: two IDR pictures in a row may not share idr_pic_id."""
    write_chunks(tmp_path / "a.mp4", [1, 1, 1, 3, 1, 2])
    assert idr_numbers(tmp_path / "a.mp4") == [0, 1, 0, 1, 0, 1]


class Stop(BaseException):
    """As ComfyUI's interrupt: no subclass of Exception."""


def raise_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int, error: BaseException) -> None:
    """Make the call number `call` of a function in video.py raise, once."""
    real, calls = getattr(video, name), iter(range(10**6))

    def wrapped(*args, **kwargs):
        if next(calls) == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(video, name, wrapped)


@pytest.mark.parametrize("error", [RuntimeError("boom"), Stop()], ids=["error", "interrupt"])
@pytest.mark.parametrize("failing", range(3))
def test_a_failed_write_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, failing: int
) -> None:
    """A failure at any frame or later step of any chunk changes nothing: law 8 for the writer."""
    chunks = moving(13).split([1, 6, 6])
    write_chunks(tmp_path / "whole.mp4", [1, 6, 6])
    for place, calls in (
        ("_yuv_frame", len(chunks[failing])),
        ("boxes", 1),
        ("_write_all", 1 + (failing > 0)),
    ):
        for call in range(calls):
            path = tmp_path / f"{place}{call}.mp4"
            stream = writer(path)
            for chunk in chunks[:failing]:
                stream.write(chunk)
            before = path.read_bytes() if failing else None
            with monkeypatch.context() as patch:
                raise_at(patch, place, call, error)
                with pytest.raises(type(error)):
                    stream.write(chunks[failing])
            assert (path.read_bytes() if failing else None) == before
            assert path.exists() == bool(failing)
            for chunk in chunks[failing:]:
                stream.write(chunk)
            stream.abort()
            assert path.read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("stage", ["convert", "encode", "mux"])
def test_a_failure_inside_ffmpeg_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """The encoder has been fed and the chunk's muxer opened: both are thrown away."""
    write_chunks(tmp_path / "whole.mp4", [3, 3])
    stream = writer(tmp_path / "a.mp4")
    first, second = moving(6).split(3)
    stream.write(first)
    with monkeypatch.context() as patch:

        def fail(*_):
            raise OSError("boom")

        def packets(self, output, frames):
            yield from real(self, output, frames)[: {"encode": 0, "mux": 2}[stage]]
            fail()

        real = VideoWriter._packets
        if stage == "convert":
            patch.setattr(video, "to_uint8", fail)
        else:
            patch.setattr(VideoWriter, "_packets", packets)
        with pytest.raises(OSError, match="boom"):
            stream.write(second)
    stream.write(second)
    stream.abort()
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


@pytest.fixture
def disk_limit():
    """A function that makes every file end at so many bytes, in the kernel, until the test ends."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size or soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_whole_chunks(tmp_path: Path, disk_limit) -> None:
    """The kernel takes a part of a chunk and then refuses; the part is cut off again."""
    path, frames = tmp_path / "a.mp4", moving(13)
    write_chunks(tmp_path / "whole.mp4", [1, 6, 6])
    stream, chunks = writer(path), frames.split([1, 6, 6])
    for chunk in chunks:
        size = path.stat().st_size if path.exists() else 0
        disk_limit(size + 500)
        with pytest.raises(OSError) as caught:
            stream.write(chunk)
        disk_limit(None)
        assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
        assert (path.stat().st_size if path.exists() else 0) == size
        stream.write(chunk)
    stream.abort()
    assert path.read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_a_full_disk_at_close_keeps_the_fragmented_file(
    tmp_path: Path, disk_limit, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever the remux runs out of disk, the old file stays and a warning says so."""
    path = tmp_path / "a.mp4"
    write_chunks(path, [1, 12, 12])
    before = path.read_bytes()
    for size in range(0, len(before), 1500):
        disk_limit(size or 1)
        with pytest.raises((OSError, ValueError)):
            remux_fast_start(path, {"prompt": "x" * 3000})
        disk_limit(None)
        assert path.read_bytes() == before
    stream = writer(tmp_path / "b.mp4")
    stream.write(moving(12))
    disk_limit(1000)
    with caplog.at_level(logging.WARNING):
        assert stream.close({"prompt": "x"}) is False
    disk_limit(None)
    assert "stays fragmented" in caplog.text
    assert probe(tmp_path / "b.mp4").frames == 12
    assert not list(tmp_path.glob(".*"))


def test_a_killed_process_leaves_every_announced_frame(tmp_path: Path) -> None:
    """SIGKILL between and inside writes: what was announced decodes, and can be remuxed."""
    path = tmp_path / "a.mp4"
    program = f"""
        import sys, torch
        from sneakpeek_core.video import VideoWriter
        torch.set_num_threads(1)
        writer = VideoWriter({str(path)!r}, width=96, height=64, fps=16)
        while True:
            writer.write(torch.rand(4, 64, 96, 3))
            print(writer.frames, flush=True)
    """
    root = Path(video.__file__).parent.parent
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert child.stdout
    announced = 0
    while announced < 40:
        announced = int(child.stdout.readline())
    child.kill()
    announced = max([announced, *(int(line) for line in child.stdout.read().split())])
    child.wait()
    child.stdout.close()
    pictures, pts, _, _ = decoded(path)
    assert len(pictures) >= announced and len(set(np.diff(pts))) == 1
    remux_fast_start(path, {"sneakpeek": "rescued"})
    assert probe(path).frames >= announced
    assert probe(path).metadata == {"sneakpeek": "rescued"}


def test_leaving_by_an_exception_keeps_the_chunks(tmp_path: Path) -> None:
    """An exception through the with block aborts: playable, not remuxed; nothing without chunks."""
    with pytest.raises(Stop), writer(tmp_path / "a.mp4") as stream:
        stream.write(moving(5))
        raise Stop
    assert probe(tmp_path / "a.mp4").frames == 5
    with pytest.raises(ValueError, match="is closed"):
        stream.write(moving(5))
    with pytest.raises(Stop), writer(tmp_path / "b.mp4"):
        raise Stop
    with writer(tmp_path / "c.mp4"):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_an_old_file_stays_until_the_first_chunk(tmp_path: Path) -> None:
    """overwrite=True replaces the old file only by a whole first chunk."""
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="overwrite=True"):
        writer(path)
    stream = writer(path, overwrite=True)
    with pytest.raises(ValueError, match="NaN"):
        stream.write(moving(2) * float("nan"))
    assert path.read_bytes() == b"old"
    stream.write(moving(2))
    assert probe(path).frames == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.mkv", {}, r"use a\.mp4"),
        ("no/a.mp4", {}, "does not exist; create"),
        ("folder.mp4", {}, "is a folder"),
        ("a.mp4", {"codec": "divx"}, "unknown; available: .*h264"),
        ("a.mp4", {"crf": 0}, r"1\.\.51 for h264; use 18"),
        ("a.mp4", {"width": 95}, "width 95 is not even and .*; use 96"),
        ("a.mp4", {"width": 48, "codec": "av1"}, "and 64 or more; use 64"),
        ("a.mp4", {"fps": 0}, "fps 0"),
        ("a.mp4", {"fps": float("nan")}, "fps nan"),
    ],
)
def test_bad_settings_are_refused_before_anything_exists(
    tmp_path: Path, name: str, options: dict, message: str
) -> None:
    """Each is a ValueError with the fix, and no file appears."""
    if options.get("codec") == "av1" and "av1" not in available_codecs():
        pytest.skip("no AV1 encoder in this FFmpeg build")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match=message):
        writer(tmp_path / name, **options)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.mp4"]


def test_absent_codec_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A codec of the table that this FFmpeg lacks is named as such, with what there is."""
    monkeypatch.setattr(video.av, "codecs_available", {"libx264"})
    assert available_codecs() == ("h264",) and set(CODECS) == {"h264", "h265", "vp9", "av1"}
    with pytest.raises(ValueError, match="'av1' is not in this FFmpeg build; available: h264"):
        writer(tmp_path / "a.mp4", codec="av1")


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(0, HEIGHT, WIDTH, 3),
        torch.zeros(2, WIDTH, HEIGHT, 3),
        torch.zeros(HEIGHT, WIDTH, 3),
        torch.zeros(2, HEIGHT, WIDTH, 4),
        torch.zeros(2, HEIGHT, WIDTH, 3, dtype=torch.int32),
    ],
)
def test_bad_chunks_are_refused(tmp_path: Path, frames: Tensor) -> None:
    """Wrong shape or type: a ValueError, no file."""
    with pytest.raises(ValueError, match="a chunk"):
        writer(tmp_path / "a.mp4").write(frames)
    assert not list(tmp_path.iterdir())


def test_to_uint8_clamps_and_rounds() -> None:
    """0.5 levels round to even, outside values clamp, every float type gives the same."""
    values = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 0.5, 1.0, 7.0])
    want = torch.tensor([0, 0, 0, 1, 128, 255, 255], dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        assert torch.equal(to_uint8(values.to(dtype)), want)
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels / 255), levels) and to_uint8(levels) is levels


def test_memory_does_not_grow_with_chunks(tmp_path: Path) -> None:
    """200 chunks leave nothing behind in Python's memory."""
    stream, chunk = writer(tmp_path / "a.mp4", width=16, height=16), moving(1, 16, 16)
    for _ in range(20):
        stream.write(chunk)
    tracemalloc.start()
    try:
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(200):
            stream.write(chunk)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 20_000
    assert probe(tmp_path / "a.mp4").frames == 220
