"""LoRA on a Wan transformer with `peft`, written as `model.lora` reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.lora import PREFIX
from ..model.weights import KIND, save_model

ATTENTION = ("q", "k", "v", "o")
TARGETS = (
    *(f"{part}.{name}" for part in ("self_attn", "cross_attn") for name in ATTENTION),
    "ffn.0",
    "ffn.2",
)


@dataclass(frozen=True, kw_only=True)
class LoraRecipe:
    """A recipe's `[lora]`; without one the whole model is trained."""

    rank: int = 16
    alpha: int = 16

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"lora rank {self.rank}, alpha {self.alpha} must be above 0; use 16")


def add_lora(tree: nn.Module, recipe: LoraRecipe, seed: int = 0) -> None:
    """Put adapters beside the linear layers of every block, in place; only they are trained.

    They begin random, as a function of `seed`, and change nothing yet.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(TARGETS), bias="none"
    )
    tree.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, tree)


def lora_tensors(tree: nn.Module) -> dict[str, Tensor]:
    """Return the adapters of `add_lora` under the names that other programs know."""
    from peft.tuners.lora import Linear

    found = {}
    for name, module in tree.named_modules():
        if isinstance(module, Linear):
            (adapter,) = module.lora_A
            found[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A[adapter].weight
            found[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B[adapter].weight
            scale = module.scaling[adapter] * module.r[adapter]
            found[f"{PREFIX}{name}.alpha"] = torch.tensor(float(scale))
    return found


def save_lora(tree: nn.Module, path: Path, metadata: dict[str, Any]) -> None:
    """Write the adapters of `add_lora`."""
    save_model(path, lora_tensors(tree), {KIND: "lora", **metadata})
