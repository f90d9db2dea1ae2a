"""3-D rotary positions of Wan: temporal, row and column bands, computed for any real position.

There is no table: angles are made from the positions that are asked for, so a video does not end
at frame 1024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10000.0


class Rope(NamedTuple):
    """Rotation of every token of a call. Both [T, 1, D/2], float32."""

    cos: Tensor
    sin: Tensor


def band_sizes(head_dim: int) -> tuple[int, int, int]:
    """Return how many rotated pairs of a head carry time, row and column (128: 22, 21, 21)."""
    space = head_dim // 6
    return head_dim // 2 - 2 * space, space, space


def rope_for(
    positions: Sequence[float],
    rows: int,
    columns: int,
    *,
    head_dim: int,
    device: torch.device | str = "cpu",
) -> Rope:
    """Return the rotation of the tokens of frames at temporal `positions`, frame-major.

    `rows` and `columns` count tokens. Angles are made in float64: at position 10,000 a float32
    angle of the fastest pair would already be off by 1e-3 radians.
    """
    bands = band_sizes(head_dim)
    grids = torch.meshgrid(
        torch.tensor(list(positions), dtype=torch.float64),
        torch.arange(rows, dtype=torch.float64),
        torch.arange(columns, dtype=torch.float64),
        indexing="ij",
    )
    angles = torch.cat(
        [
            grid.reshape(-1, 1) * THETA ** -(torch.arange(n, dtype=torch.float64) / n)
            for grid, n in zip(grids, bands, strict=True)
        ],
        dim=1,
    ).unsqueeze(1)
    return Rope(angles.cos().float().to(device), angles.sin().float().to(device))


def rotate(x_BTND: Tensor, rope: Rope) -> Tensor:
    """Rotate neighbouring pairs of the last axis; arithmetic in float32, result in x's dtype."""
    even, odd = x_BTND.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = (even * rope.cos - odd * rope.sin, even * rope.sin + odd * rope.cos)
    return torch.stack(turned, dim=-1).flatten(-2).to(x_BTND.dtype)
