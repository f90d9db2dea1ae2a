"""Law 8 on a full disk: what does not fit is not written by halves, and is made once more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sneakpeek_core import video
from sneakpeek_core.journal import Journal, read
from sneakpeek_core.latent_store import LatentStore
from sneakpeek_core.recording import keep_journal, resume
from sneakpeek_core.records import Record
from sneakpeek_core.shapes import frames_of
from tests.interrupts import Recording, Trip, Undisturbed, check_boundary, undisturbed_runs
from tests.laws import decodable_frames, small_stream
from tests.small import conditioner, latents_of, model, settings


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Undisturbed]:
    return undisturbed_runs(tmp_path_factory)


@pytest.mark.parametrize("at", [1, 2, 5, 12])
def test_full_disk_under_the_video(
    at: int, undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Law 8: when only a part of a chunk fits the disk, the file ends with the chunk before."""
    trip, real = Trip(at, OSError(28, "No space left on device")), video._write_all

    def write_all(file, content: bytes) -> None:
        trip.calls += 1
        if trip.calls == trip.at:
            real(file, content[: len(content) // 2])
            raise trip.error
        real(file, content)

    monkeypatch.setattr(video, "_write_all", write_all)
    recording = Recording(tmp_path, settings())
    with pytest.raises(OSError, match="No space"):
        recording.finish()
    if recording.path.exists():
        assert decodable_frames(recording.path) == frames_of(2 * len(recording.seen) - 1)
    recording.finish().check_equals(undisturbed("planned").recording)


@pytest.mark.parametrize("at", [1, 2, 4, 6])
def test_full_disk_under_the_journal(at: int, undisturbed, tmp_path: Path):
    """Law 8: a journal record is written whole or not at all; the chunk is made once more, and
    neither the journal nor the video holds it twice."""
    folder = tmp_path / "videos"
    folder.mkdir()
    recording = Recording(folder, settings())
    path = tmp_path / "x.journal"
    keep_journal(recording.stream, path)
    size = path.stat().st_size
    if at > 1:
        recording.stream.chunk(at - 1)
        size = path.stat().st_size
    with file_size_limit(size + 1000), pytest.raises(OSError, match="File too large"):
        recording.finish()
    assert len(recording.stream) == at
    assert path.stat().st_size == size
    check_boundary(recording.stream, undisturbed("planned"))
    recording.finish().check_equals(undisturbed("planned").recording)
    recording.stream.close()
    again = resume(path, model(), conditioner())
    assert len(again) == 7
    assert torch.equal(latents_of(again), latents_of(undisturbed("planned").recording.stream))


class file_size_limit:
    """Files cannot grow beyond `size` bytes: a real full disk for whoever writes one."""

    def __init__(self, size: int):
        self._resource = pytest.importorskip("resource")  # POSIX only
        self._limits = self._resource.getrlimit(self._resource.RLIMIT_FSIZE)
        self._size = size

    def __enter__(self) -> None:
        self._resource.setrlimit(self._resource.RLIMIT_FSIZE, (self._size, self._limits[1]))

    def __exit__(self, *_: object) -> None:
        self._resource.setrlimit(self._resource.RLIMIT_FSIZE, self._limits)


@pytest.mark.parametrize("room", [0, 5, 50, 9000, 20000])
def test_a_journal_record_is_whole_or_absent(room: int, tmp_path: Path):
    """Law 8: an append that fails half-way, wherever, changes nothing, and can be repeated."""
    path = tmp_path / "x.journal"
    one = Record("journal-chunk", {"n": 1}, {"latents": torch.randn(6000)})
    with Journal.create(path, Record("journal-start", {}, {})) as journal:
        size = path.stat().st_size
        with file_size_limit(size + room), pytest.raises(OSError, match="File too large"):
            journal.append(one)
        assert path.stat().st_size == size
        journal.append(one)
    assert [record.kind for record in read(path)] == ["journal-start", "journal-chunk"]


def test_full_disk_under_the_spilled_latents(
    undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Law 8: when old latents cannot be spilled, the chunk at hand is not half remembered."""
    expected = latents_of(undisturbed("planned").recording.stream)
    for at in range(1, 6):
        trip, real = Trip(at, OSError(28, "No space left on device")), LatentStore._spill

        def spill(store: LatentStore, index: int, trip=trip, real=real) -> None:
            trip()
            real(store, index)

        source = small_stream()
        source._latents._ram_bytes = 5000  # two chunks
        keep_journal(source, tmp_path / "x.journal")
        with monkeypatch.context() as patch:
            patch.setattr(LatentStore, "_spill", spill)
            with pytest.raises(OSError, match="No space"):
                latents_of(source)
            made = [*source]
        source.close()
        assert [chunk.first for chunk in made] == [0, 1, 3, 5, 7, 9, 11]
        assert torch.equal(torch.cat([chunk.latents_BCFHW for chunk in made], dim=2), expected)
        again = resume(tmp_path / "x.journal", model(), conditioner())
        again.close()
        assert torch.equal(latents_of(again), expected)
