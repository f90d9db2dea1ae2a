"""Randomness as a function of what it is for, so that any chunk can be made again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# (kind, chunk, pass, shape without batch) -> [B, *shape], float32, on the CPU.
NoiseSource = Callable[[str, int, int, Sequence[int]], Tensor]


def seeded_noise(seeds: Sequence[int]) -> NoiseSource:
    """Return standard normal noise that depends on (seed, kind, chunk, pass) and nothing else.

    One seed per row of the batch, so that a row equals the same seed run alone. Drawn on the CPU:
    devices differ in their generators, a seed should not.
    """

    def draw(kind: str, chunk: int, index: int, shape: Sequence[int]) -> Tensor:
        rows = []
        for seed in seeds:
            key = hashlib.blake2b(f"{seed}/{kind}/{chunk}/{index}".encode(), digest_size=8)
            rng = torch.Generator().manual_seed(int.from_bytes(key.digest(), "little") >> 1)
            rows.append(torch.randn(tuple(shape), generator=rng))
        return torch.stack(rows)

    return draw
