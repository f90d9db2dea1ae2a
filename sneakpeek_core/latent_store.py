"""The latents a stream has made, chunk by chunk: the newest in memory, older ones in a file."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from typing import IO

import numpy as np
import torch
from torch import Tensor

RAM_BYTES = 256 * 2**20


class LatentStore:
    """An append-only list of float32 tensors that holds at most `ram_bytes` of them in memory.

    Older ones go to an unnamed temporary file, which the system removes with the process.
    """

    def __init__(self, ram_bytes: int = RAM_BYTES):
        self._ram_bytes = ram_bytes
        self._shapes: list[tuple[int, ...]] = []
        self._held: dict[int, Tensor] = {}
        self._spilled = 0  # the first index that is in memory
        self._offsets: list[int] = []
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, index: int) -> Tensor:
        if index in self._held:
            return self._held[index]
        if not 0 <= index < len(self):
            raise IndexError(index)
        assert self._file is not None
        shape = self._shapes[index]
        self._file.seek(self._offsets[index])
        data = bytearray(self._file.read(4 * math.prod(shape)))
        return torch.frombuffer(data, dtype=torch.float32).reshape(shape)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    @property
    def ram_bytes(self) -> int:
        return sum(4 * t.numel() for t in self._held.values())

    def append(self, latents: Tensor) -> None:
        """Take latents in; they must not be written to afterwards."""
        latents = latents.detach().float().cpu()
        size = 4 * latents.numel()
        if latents.untyped_storage().nbytes() > size:  # do not hold what it was cut from
            latents = latents.clone()
        while self._held and self.ram_bytes + size > self._ram_bytes:
            self._spill(self._spilled)
        self._held[len(self)] = latents
        self._shapes.append(tuple(latents.shape))

    def drop_last(self) -> None:
        """Take the newest latents out again."""
        del self._held[len(self) - 1]
        self._shapes.pop()

    def _spill(self, index: int) -> None:
        if self._file is None:
            # Unbuffered: bytes that a full disk refused must not come again with the next call.
            self._file = tempfile.TemporaryFile(prefix="sneakpeek-", buffering=0)  # noqa: SIM115
        offset = self._offsets[-1] + 4 * math.prod(self._shapes[index - 1]) if index else 0
        self._file.seek(offset)
        rest = memoryview(np.ascontiguousarray(self._held[index].numpy()).tobytes())
        while rest:
            rest = rest[self._file.write(rest) :]
        self._offsets.append(offset)
        self._spilled = index + 1
        del self._held[index]
