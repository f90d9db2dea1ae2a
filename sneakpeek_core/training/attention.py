"""Attention as whole matrices, for short sequences on a CPU.

There PyTorch's blockwise attention is slow under a mask, backward most of all. The tiny model's
sequences are short enough for their weights to be written out: forward and backward of a whole
model take 0.7 of the time (two AVX-512 cores with AMX, bf16), and its gradients are no farther
from fp32's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.forward import sdpa

MOST_WEIGHTS = 2**25  # of all heads and rows, some 64 MB in bf16


def attend(q_BTND: Tensor, k_BTND: Tensor, v_BTND: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled-dot-product attention as `model.forward.Attend` wants it, whichever way is faster.

    Every query must see something.
    """
    batch, queries, heads, width = q_BTND.shape
    weights = batch * heads * queries * k_BTND.shape[1]
    if q_BTND.device.type != "cpu" or weights > MOST_WEIGHTS:
        return sdpa(q_BTND, k_BTND, v_BTND, mask)
    q, k, v = (t.transpose(1, 2) for t in (q_BTND, k_BTND, v_BTND))
    logits_BNTT = (q * width**-0.5) @ k.transpose(-1, -2)
    if mask is not None and mask.dtype == torch.bool:
        logits_BNTT = logits_BNTT.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        logits_BNTT = logits_BNTT + mask.to(logits_BNTT.dtype)
    # Autocast would widen the softmax to fp32, which is what takes the time.
    with torch.autocast("cpu", enabled=False):
        weights_BNTT = logits_BNTT.softmax(-1)
    return (weights_BNTT @ v).transpose(1, 2)
