"""What the CPU computes in hardware."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache
def has_bf16() -> bool:
    """Say whether the CPU multiplies bf16 itself; where it does not, fp32 is much faster."""
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
