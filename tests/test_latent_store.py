"""Latents beyond the memory budget go to a file and come back as they were."""

from __future__ import annotations

import tempfile
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from sneakpeek_core.latent_store import LatentStore


def chunks(count: int, seed: int = 0) -> list[Tensor]:
    """Chunks of different lengths, with values that only an exact copy keeps."""
    rng = torch.Generator().manual_seed(seed)
    made = [torch.randn(1, 4, 1 + i % 3, 2, 3, generator=rng) for i in range(count)]
    made[0].view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42])
    return made


def exact(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit (NaN and signed zeros included)."""
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))


@pytest.mark.parametrize("ram_bytes", [0, 400, 1000, 10**9])
def test_what_goes_in_comes_out(ram_bytes: int):
    """Every chunk reads back bit for bit, at any time and in any order, spilled or not."""
    made, store = chunks(25), LatentStore(ram_bytes)
    for count, latents in enumerate(made, 1):
        store.append(latents)
        assert len(store) == count
        for index in (0, count // 2, count - 1):
            assert store[index].shape == made[index].shape
            assert exact(store[index], made[index])
    assert all(map(exact, store, made))
    assert all(exact(store[i], made[i]) for i in reversed(range(25)))
    for outside in (25, 100, -1):
        with pytest.raises(IndexError):
            store[outside]


def test_memory_is_bounded():
    """Tensors beyond the budget are let go of; the newest one always stays."""
    budget = 4 * 4 * 2 * 3 * 6  # six latent frames
    store, alive, held = LatentStore(budget), [], []
    for index in range(30):
        memory = np.zeros((1, 4, 1 + index % 3, 2, 3), dtype=np.float32)
        alive.append((memory.nbytes, weakref.ref(memory)))
        store.append(torch.from_numpy(memory))  # which keeps `memory` alive for as long as it lives
        del memory
        held = [size for size, ref in alive if ref() is not None]
        assert sum(held) == store.ram_bytes <= budget
        assert alive[-1][1]() is not None
    assert len(held) < 6
    small = LatentStore(1)
    for latents in chunks(3):
        small.append(latents)
        assert small.ram_bytes == 4 * latents.numel()


def test_a_view_does_not_hold_what_it_was_cut_from():
    """Latents cut from a larger tensor (keyframes behind a chunk) count, and cost, their own
    bytes: what they were cut from is let go of."""
    store = LatentStore(10**6)
    whole = torch.randn(1, 4, 50, 2, 3)
    store.append(whole[:, :, :2])
    assert store[0].untyped_storage().nbytes() == store.ram_bytes
    assert exact(store[0], whole[:, :, :2])


def test_any_layout_and_dtype_is_taken():
    """Permuted, half precision and gradient-carrying latents are kept as plain float32 values."""
    store = LatentStore(0)
    permuted = torch.randn(2, 3, 4, 5, 6).permute(0, 4, 2, 3, 1)
    graded = torch.randn(1, 4, 1, 2, 2, requires_grad=True) * 2
    for latents in (permuted, permuted.bfloat16(), graded):
        store.append(latents)
        store.append(torch.zeros(1, 4, 1, 2, 2))  # pushes it out
        back = store[len(store) - 2]
        assert back.dtype == torch.float32
        assert not back.requires_grad
        assert torch.equal(back, latents.detach().float())


def test_what_is_read_from_disk_is_a_copy():
    """Writing into a spilled chunk that was read does not change what is stored."""
    store, made = LatentStore(0), chunks(2)
    for latents in made:
        store.append(latents)
    store[0].zero_()
    assert exact(store[0], made[0])


class FullDisk:
    """A file on a disk that is full while `full` is set."""

    def __init__(self, file):
        self.file, self.full = file, False

    def write(self, data: bytes) -> int:
        if self.full:
            self.file.write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def test_a_full_disk_leaves_the_store_as_it_was(monkeypatch):
    """An append that fails takes nothing in and loses nothing; when there is room it works."""
    disks: list[FullDisk] = []
    real = tempfile.TemporaryFile

    def full(*args, **kwargs) -> FullDisk:
        disks.append(FullDisk(real(*args, **kwargs)))
        return disks[-1]

    monkeypatch.setattr("sneakpeek_core.latent_store.tempfile.TemporaryFile", full)
    made, store = chunks(8), LatentStore(300)
    for latents in made[:5]:
        store.append(latents)
    assert disks, "nothing was spilled"
    disks[0].full = True
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            store.append(made[5])
        assert len(store) == 5
        assert all(map(exact, store, made[:5]))
    disks[0].full = False
    for latents in made[5:]:
        store.append(latents)
    assert len(store) == 8
    assert all(map(exact, store, made))
