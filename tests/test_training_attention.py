"""Attention in training: as the engine's, in values and gradients, whichever way it is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sneakpeek_core.model.forward import sdpa
from sneakpeek_core.training import attention

SHAPE = (2, 7, 3, 16)  # B, T, N, D


def masks() -> dict[str, Tensor | None]:
    """No mask, who sees whom, and the same added to the logits; all see themselves."""
    seen = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(1)) < 0.4
    seen |= torch.eye(7, dtype=torch.bool)
    added = torch.zeros(2, 1, 7, 7).masked_fill(~seen, -torch.inf)
    return {"none": None, "boolean": seen, "added": added}


def attended(attend, mask: Tensor | None, precision: torch.dtype) -> list[Tensor]:
    """Return what comes out, and the gradients of queries, keys and values."""
    rng = torch.Generator().manual_seed(0)
    qkv = [torch.randn(SHAPE, generator=rng).requires_grad_() for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        found = attend(*qkv, mask)
    (found.float() * torch.randn(SHAPE, generator=rng)).sum().backward()
    return [found.detach().float(), *(one.grad for one in qkv if one.grad is not None)]


@pytest.mark.parametrize("name", masks())
def test_it_is_attention(name: str):
    """In fp32 to rounding; in bf16 no farther from that than the engine's own is."""
    mask = masks()[name]
    exact = attended(sdpa, mask, torch.float32)
    torch.testing.assert_close(attended(attention.attend, mask, torch.float32), exact)
    rounded = [attended(one, mask, torch.bfloat16) for one in (attention.attend, sdpa)]
    own, theirs = (
        torch.cat([(a - b).flatten() for a, b in zip(found, exact, strict=True)]).norm()
        for found in rounded
    )
    assert own < 1.5 * theirs + 1e-6


def test_long_sequences_are_left_to_the_engine_s(monkeypatch: pytest.MonkeyPatch):
    """Weights that would fill the memory are not written out."""
    calls = []
    monkeypatch.setattr(attention, "sdpa", lambda *parts: calls.append(parts) or sdpa(*parts))
    attended(attention.attend, None, torch.float32)
    assert not calls
    monkeypatch.setattr(attention, "MOST_WEIGHTS", 2 * 7 * 3 * 7 - 1)
    attended(attention.attend, None, torch.float32)
    assert len(calls) == 1
