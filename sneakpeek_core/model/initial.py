"""Random initial weights that compute something: for training from scratch and for tests.

Everything a trained model has is non-zero here (gates, biases, modulation), so that outputs are
O(1) and depend on text, time and history. The global random state is neither used nor changed.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..vae.wan import WanVAE
from .config import ModelConfig
from .transformer import WanTransformer

Module = TypeVar("Module", bound=nn.Module)
BIAS_STD = 0.1


def random_transformer(config: ModelConfig, seed: int) -> WanTransformer:
    """Return a transformer of these sizes on the CPU in fp32, the same for the same seed."""
    with torch.device("meta"):
        tree = WanTransformer(config)
    return randomise(tree.to_empty(device="cpu"), seed)


def random_vae(dim: int, seed: int) -> WanVAE:
    """Return a Wan VAE of base width `dim` on the CPU in fp32, the same for the same seed."""
    with torch.device("meta"):
        vae = WanVAE(dim=dim)
    return randomise(vae.to_empty(device="cpu"), seed)


@torch.no_grad()
def randomise(tree: Module, seed: int) -> Module:
    """Overwrite every parameter: weights keep their input's scale, gains near 1, small biases."""
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in tree.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        parameter.copy_(_scaled(name, parameter, noise))
    return tree


def _scaled(name: str, parameter: Tensor, noise: Tensor) -> Tensor:
    if name.endswith("modulation"):
        return noise / math.sqrt(parameter.shape[-1])
    if name.endswith("bias"):
        return BIAS_STD * noise
    fan_in = math.prod(parameter.shape[1:])
    if fan_in == 1:  # the gain of a norm
        return 1.0 + BIAS_STD * noise
    return noise / math.sqrt(fan_in)
