"""A short name for the content of weights, the same on every device and in fp32 or bf16."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from .checkpoint import bare_names

# Values read of each tensor. A prime: sizes are multiples of powers of two, and a stride that is a
# whole number of rows (n / 256) would read one column again and again.
SAMPLES = 251


def weights_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return 32 hex digits for named tensors: a state dict, wrapped or bare, in any order.

    Hashed are the bare names, the shapes, and up to 251 evenly strided values of each tensor in
    bf16, so a file gives one fingerprint on any device, loaded as fp32 or bf16 (fp16 clips small
    bf16 values and may give another). Samples suffice because its job is to tell *models* apart:
    training, merging a LoRA or quantising moves nearly every value of a tensor, also the sampled
    ones, and 14B parameters are hashed without reading 28 GB. It cannot see an edit that misses
    every sample or that is lost in bf16 (under 0.4 %), and it is no protection against forgery.
    """
    bare = bare_names(tensors)
    names = sorted(bare)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr([(name, tuple(bare[name].shape)) for name in names]).encode())
    if names:
        sampled = torch.cat([_samples(bare[name]) for name in names])
        digest.update(sampled.view(torch.int16).numpy().astype("<i2").tobytes())
    return digest.hexdigest()


def _samples(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    stride = max(1, -(-flat.numel() // SAMPLES))
    return flat[::stride].to(device="cpu", dtype=torch.bfloat16)
