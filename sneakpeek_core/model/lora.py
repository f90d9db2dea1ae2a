"""LoRA files: low-rank changes of a transformer's linear layers, merged into its weights.

Files have the names that ComfyUI's own loader and diffusers-style tools know:
`diffusion_model.blocks.0.self_attn.q.lora_A.weight` and `.lora_B.weight`, with the scale
`alpha / rank` in `.alpha`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .tensor_files import open_tensors

PREFIX = "diffusion_model."


@torch.no_grad()
def merge_lora(tree: nn.Module, path: Path, strength: float = 1.0) -> None:
    """Add a file's adapters to the weights of a plain tree, in place.

    `ValueError` for a file with tensors that are no adapter of this tree.
    """
    tensors, _ = open_tensors(path)
    layers = dict(tree.named_modules())
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        stem = name.removesuffix(".lora_A.weight")
        layer = layers.get(stem.removeprefix(PREFIX))
        up = tensors.pop(f"{stem}.lora_B.weight", None)
        down = tensors.pop(name)
        alpha = tensors.pop(f"{stem}.alpha", torch.tensor(float(len(down))))
        if not isinstance(layer, nn.Linear) or up is None:
            raise ValueError(f"{path.name}: {stem} is no adapter of this model")
        if (len(up), down.shape[1]) != tuple(layer.weight.shape) or up.shape[1] != len(down):
            raise ValueError(f"{path.name}: {stem} does not fit {tuple(layer.weight.shape)}")
        change = (up.float() @ down.float()) * (float(alpha) / len(down) * strength)
        layer.weight += change.to(layer.weight)
    if tensors:
        raise ValueError(f"{path.name}: {next(iter(tensors))} is not part of a LoRA")
