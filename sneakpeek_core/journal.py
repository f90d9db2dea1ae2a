"""A stream's journal: a small file beside the video from which a fresh process goes on.

It holds the settings, the schedule with its embeddings, the clean latents of every chunk and every
live edit, in the order they happened. Keys and values are not in it: replaying the context passes
makes them again, bit for bit. A record is written whole or not at all; a torn tail (the process was
killed while writing) is cut off when the file is opened again.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from .records import Record, from_bytes, to_bytes

MAGIC = b"SNEAKPEEK-JOURNAL-1\n"
_HEAD = 12  # bytes in front of a record: 8 of length, 4 of CRC-32
MAX_RECORD = 2**32


class Journal:
    """An open journal, for appending. Use `create` or `reopen`, and close it (or use `with`).

    `file` is unbuffered: bytes that a full disk refused must not come again with a later record.
    """

    def __init__(self, path: Path, file: FileIO):
        self.path = path
        self._file = file
        self._end = file.seek(0, os.SEEK_END)

    @classmethod
    def create(cls, path: str | Path, start: Record) -> Journal:
        """Begin a journal with its first record. An older one of that name is replaced."""
        path = Path(path)
        file = path.open("w+b", buffering=0)
        try:
            file.write(MAGIC)
            journal = cls(path, file)
            journal.append(start)
        except BaseException:
            file.close()
            path.unlink(missing_ok=True)
            raise
        return journal

    @classmethod
    def reopen(cls, path: str | Path) -> tuple[Journal, Iterator[Record]]:
        """Open a journal to go on; return it with its records. A torn last record is cut off.

        Take the records before the first `append`.
        """
        path = Path(path)
        first_record(path)  # nothing is cut off a file that is no journal
        with path.open("rb") as file:
            end = file.seek(len(MAGIC))
            for data in _blocks(file):
                end += _HEAD + len(data)
        opened = path.open("r+b", buffering=0)
        opened.truncate(end)
        return cls(path, opened), read(path)

    def append(self, record: Record) -> None:
        """Write a record and hand it to the system; on any error the file is as before."""
        data = to_bytes(record)
        head = len(data).to_bytes(8, "little") + zlib.crc32(data).to_bytes(4, "little")
        try:
            self._file.seek(self._end)
            for part in (head, data):
                rest = memoryview(part)
                while rest:
                    rest = rest[self._file.write(rest) :]
        except BaseException:
            self._file.truncate(self._end)
            raise
        self._end = self._file.tell()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: str | Path) -> Iterator[Record]:
    """Yield the whole records of a journal, one in memory at a time; `ValueError` if it is none."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"journal {path} does not exist; it lies beside the video as NAME.journal")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path} is not a SneakPeek journal; give the NAME.journal file")
        begun = False
        for data in _blocks(file):
            try:
                record = from_bytes(data)
            except ValueError as error:
                raise ValueError(f"journal {path} is damaged ({error}); begin anew") from error
            if not begun and record.kind != "journal-start":
                break
            begun = True
            yield record
    if not begun:
        raise ValueError(f"journal {path} has no start; begin the video anew")


def first_record(path: str | Path) -> Record:
    """Return how a journal begins; `ValueError` if it is none."""
    return next(read(path))


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """Yield the data of whole records; stop at the first that is torn."""
    while len(head := file.read(_HEAD)) == _HEAD:
        size = int.from_bytes(head[:8], "little")
        left = os.fstat(file.fileno()).st_size - file.tell()
        if size > min(MAX_RECORD, left):
            return
        data = file.read(size)
        if zlib.crc32(data) != int.from_bytes(head[8:], "little"):
            return
        yield data
