"""A journal survives being cut anywhere, and nothing on disk is ever a pickle."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import sneakpeek_core
from sneakpeek_core.journal import MAGIC, Journal, first_record, read
from sneakpeek_core.records import HEADER, KIND, Record, from_bytes, to_bytes

START = Record("journal-start", {"fps": 16.0, "text": "香水 🍳"}, {"text.0": torch.arange(6.0)})


def chunk(number: int, size: int = 4) -> Record:
    latents = torch.full((1, 2, size), float(number)) + torch.arange(size)
    return Record("journal-chunk", {"planned_at": number}, {"latents": latents})


def write(path: Path, *records: Record) -> Path:
    with Journal.create(path, START) as journal:
        for record in records:
            journal.append(record)
    return path


def same(one: Record, other: Record) -> bool:
    return (
        one[:2] == other[:2]
        and one.tensors.keys() == other.tensors.keys()
        and all(
            torch.equal(tensor, other.tensors[name]) and tensor.dtype == other.tensors[name].dtype
            for name, tensor in one.tensors.items()
        )
    )


def check(path: Path, *expected: Record) -> None:
    records = list(read(path))
    assert len(records) == len(expected)
    assert all(map(same, records, expected))
    assert same(first_record(path), expected[0])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "video.journal"


# -- whole files -----------------------------------------------------------------------------------


def test_what_was_written_is_read(path: Path):
    """Records come back in order with header and tensors, also while the journal is still open."""
    half = Record("journal-edit", {"a": [1, None, "ü"]}, {"x": torch.ones(2, 3).bfloat16()})
    with Journal.create(path, START) as journal:
        check(path, START)
        for count, record in enumerate((chunk(1), half, chunk(2)), 1):
            journal.append(record)
            assert len(list(read(path))) == count + 1
    check(path, START, chunk(1), half, chunk(2))


def test_reopening_goes_on(path: Path):
    """A journal that is opened again keeps its records, and new ones come behind them."""
    write(path, chunk(1))
    for number in (2, 3):
        journal, records = Journal.reopen(path)
        with journal:
            assert len(list(records)) == number
            journal.append(chunk(number))
    check(path, START, chunk(1), chunk(2), chunk(3))


def test_records_are_read_one_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch):
    """However long a journal is, one record is in memory: the next is read when it is taken."""
    write(path, *(chunk(i) for i in range(9)))
    parsed: list[bytes] = []

    def counting(data: bytes) -> Record:
        parsed.append(data)
        return from_bytes(data)

    monkeypatch.setattr("sneakpeek_core.journal.from_bytes", counting)
    assert same(first_record(path), START) and len(parsed) == 1
    journal, records = Journal.reopen(path)
    with journal:
        parsed.clear()
        assert [next(records).kind, next(records).kind] == ["journal-start", "journal-chunk"]
        assert len(parsed) == 2


def test_creating_replaces_an_older_one(path: Path):
    """A new video of the same name begins anew: nothing of an older, longer journal is left."""
    write(path, *(chunk(i) for i in range(9)))
    write(path, chunk(7))
    check(path, START, chunk(7))


def test_a_journal_that_cannot_begin_leaves_no_file(path: Path):
    """When the first record cannot be written there is no file, which would be no journal."""
    with pytest.raises(TypeError):
        Journal.create(path, Record("journal-start", {"fps": object()}, {}))
    assert not path.exists()


# -- damaged files ---------------------------------------------------------------------------------


def test_a_torn_tail_is_cut_at_any_byte(path: Path):
    """Killed at any byte of its last record, a journal keeps the records before, and the next
    record lands right behind them."""
    write(path, chunk(1))
    whole = path.stat().st_size
    write(path, chunk(1), chunk(2))
    data = path.read_bytes()
    assert len(data) > whole + 20
    for length in range(whole, len(data)):
        path.write_bytes(data[:length])
        check(path, START, chunk(1))
        assert path.stat().st_size == length, "reading changes nothing"
        journal, records = Journal.reopen(path)
        with journal:
            assert len(list(records)) == 2
            assert path.stat().st_size == whole
            if length % 29 == 0:
                journal.append(chunk(3))
                check(path, START, chunk(1), chunk(3))


def test_a_flipped_bit_ends_the_journal_there(path: Path):
    """A record whose checksum is wrong is not believed, nor what follows it."""
    write(path, chunk(1))
    whole = path.stat().st_size
    write(path, chunk(1), chunk(2), chunk(3))
    data = path.read_bytes()
    for offset in range(whole, whole + (len(data) - whole) // 2, 7):
        damaged = bytearray(data)
        damaged[offset] ^= 0x10
        path.write_bytes(damaged)
        check(path, START, chunk(1))


def test_a_huge_length_is_a_torn_tail(path: Path):
    """A length that the file does not have is not read, let alone allocated."""
    write(path, chunk(1))
    with path.open("ab") as file:
        file.write((2**62).to_bytes(8, "little") + bytes(100))
    check(path, START, chunk(1))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not a SneakPeek journal; give the NAME.journal file"),
        (b"\x00\x00\x00\x20ftypisom" + bytes(100), "is not a SneakPeek journal"),
        (MAGIC[:-2], "is not a SneakPeek journal"),
        (MAGIC, "has no start; begin the video anew"),
        (MAGIC + bytes(5), "has no start; begin the video anew"),
    ],
    ids=["empty", "mp4", "half a magic", "magic alone", "torn start"],
)
def test_foreign_files_are_refused_and_left_alone(path: Path, data: bytes, words: str):
    """A file that is no journal is refused by name, by reading and by reopening, unchanged."""
    path.write_bytes(data)
    for opening in (first_record, Journal.reopen):
        with pytest.raises(ValueError, match=words) as error:
            opening(path)
        assert path.name in str(error.value)
        assert path.read_bytes() == data


def test_a_missing_file_is_refused(path: Path):
    """A journal that is not there is named, with where it lies."""
    with pytest.raises(ValueError, match=r"does not exist; it lies beside the video as NAME\.jo"):
        Journal.reopen(path)
    assert not path.exists()


def test_a_journal_begins_with_its_start(path: Path):
    """Records without a start in front are refused."""
    with Journal.create(path, chunk(1)):
        pass
    with pytest.raises(ValueError, match="has no start"):
        first_record(path)


def block(metadata: str) -> bytes:
    head = f'{{"__metadata__":{metadata}}}'.encode()
    return len(head).to_bytes(8, "little") + head


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04 a torch zip",
        bytes(20),
        (2**40).to_bytes(8, "little") + b"{}",
        to_bytes(START)[:-1],
        block("{}"),
        block('{"other": "x"}'),
        block(f'{{"{KIND}":"cache","{HEADER}":"[1]"}}'),
        block(f'{{"{KIND}":"cache","{HEADER}":"{{"}}'),
        block(f'{{"{KIND}":5,"{HEADER}":"{{}}"}}'),
        block("[]"),
        block("null"),
        (2).to_bytes(8, "little") + b"[]",
        block(f'{{"{KIND}":"cache","{HEADER}":"' + "[" * 100_000 + '"}'),
    ],
    ids=[
        "empty", "zip", "zeros", "huge", "cut", "bare", "foreign", "list header", "torn header",
        "number kind", "list metadata", "no metadata", "list", "deep header",
    ],
)  # fmt: skip
def test_damaged_blocks_are_value_errors(data: bytes):
    """Whatever bytes a file holds, reading them is a `ValueError` and nothing else."""
    with pytest.raises(ValueError):
        from_bytes(data)


# -- a disk that fills up --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 3000], ids=["buffered", "larger than the buffer"])
@pytest.mark.parametrize("room", [0, 6, 100])
def test_a_full_disk_costs_only_the_record_that_met_it(path: Path, size: int, room: int):
    """When the disk is full an append raises; the file stays readable, and when there is room
    again the next append lands right behind the last whole record."""
    resource = pytest.importorskip("resource", reason="a file size limit stands in for the disk")
    journal = Journal.create(path, START)
    journal.append(chunk(1, size))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number in (2, 3):  # it stays full for two attempts
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, hard))
        try:
            with pytest.raises(OSError):
                journal.append(chunk(number, size))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        check(path, START, chunk(1, size))
    journal.append(chunk(4, size))
    check(path, START, chunk(1, size), chunk(4, size))
    journal.append(chunk(5, size))
    journal.close()
    check(path, START, chunk(1, size), chunk(4, size), chunk(5, size))


class Interrupted:
    """A file whose writes stop half way while `armed` is set."""

    def __init__(self, file):
        self.file, self.armed, self.after = file, False, 0

    def write(self, data: bytes) -> int:
        if self.armed and len(data) > 20:
            self.file.write(data[: self.after])
            raise KeyboardInterrupt
        return self.file.write(data)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


@pytest.mark.parametrize("after", [0, 1, 50])
def test_an_interrupted_append_leaves_the_file_as_before(path: Path, after: int, monkeypatch):
    """An interrupt in the middle of a record leaves the bytes before it and no others."""
    journal = Journal.create(path, START)
    before = path.read_bytes()
    broken = Interrupted(journal._file)
    monkeypatch.setattr(journal, "_file", broken)
    broken.armed, broken.after = True, after
    with pytest.raises(KeyboardInterrupt):
        journal.append(chunk(1))
    assert path.read_bytes() == before
    broken.armed = False
    journal.append(chunk(2))
    journal.close()
    check(path, START, chunk(2))


# -- no pickle -------------------------------------------------------------------------------------

SOURCES = sorted(Path(sneakpeek_core.__file__).parent.rglob("*.py"))
PICKLES = r"(?:_?pickle|cPickle|cloudpickle|dill|joblib|shelve|marshal)"
UNSAFE = re.compile(
    # Naming the error that a refused file raises is all that pickle is good for.
    rf"\b{PICKLES}\.(?!UnpicklingError\b)\w+|\bfrom {PICKLES} import (?!UnpicklingError$)"
    r"|weights_only\s*=\s*(?!True\b)\w+|allow_pickle\s*=\s*(?!False\b)\w+"
    r"|\btorch\.save\(|\btorch\.load\((?![^)]*weights_only=True)",
    re.MULTILINE,
)


@pytest.mark.parametrize(
    "line",
    [
        "from pickle import loads", "x = pickle.loads(data)", "torch.save(x, path)",
        "torch.load(path)", "torch.load(path, weights_only=False)", "weights_only = flag",
        "np.load(path, allow_pickle=True)", "    from joblib import load  # later",
    ],
)  # fmt: skip
def test_the_search_for_pickles_finds_them(line: str):
    """Every way to read or write a pickle is recognised, and the safe ways are not."""
    assert UNSAFE.search(f"x = 1\n{line}\n")
    assert not UNSAFE.search("torch.load(path, map_location='cpu', weights_only=True)")
    assert not UNSAFE.search("never a pickle: load(data)")
    assert not UNSAFE.search("import pickle\nexcept pickle.UnpicklingError as error:")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_the_core_never_unpickles(source: Path):
    """No file of the core calls pickle (or its kin), or lets torch or numpy do so."""
    found = UNSAFE.search(source.read_text(encoding="utf-8"))
    assert found is None, f"{source.name}: {found[0] if found else ''}"
