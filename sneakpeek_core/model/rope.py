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
    """Rotation of every token of a call: unit complex numbers [T, 1, D/2], complex64."""

    turns: Tensor


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
    angle of the fastest pair would already be off by 1e-3 radians. Each axis has its own small
    table, so the cost does not grow with the number of tokens.
    """
    axes = (
        torch.tensor(list(positions), dtype=torch.float64),
        torch.arange(rows),
        torch.arange(columns),
    )
    shape = tuple(len(axis) for axis in axes)
    tables = []
    for place, (axis, pairs) in enumerate(zip(axes, band_sizes(head_dim), strict=True)):
        angles = axis.double()[:, None] * THETA ** -(torch.arange(pairs).double() / pairs)
        table = torch.complex(angles.cos().float(), angles.sin().float()).to(device)
        outline = [1, 1, 1]
        outline[place] = len(axis)
        tables.append(table.view(*outline, pairs).expand(*shape, pairs))
    return Rope(torch.cat(tables, dim=-1).flatten(0, 2).unsqueeze(1))


def rotate(x_BTND: Tensor, rope: Rope) -> Tensor:
    """Rotate neighbouring pairs of the last axis; arithmetic in float32, result in x's dtype."""
    pairs = torch.view_as_complex(x_BTND.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope.turns).flatten(-2).to(x_BTND.dtype)
