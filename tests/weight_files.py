"""Files of weights by their headers: names and shapes of what is known, without the data."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from torch import Tensor

from sneakpeek_core.model.config import ModelConfig
from sneakpeek_core.model.transformer import WanTransformer

SMALL = ModelConfig(dim=128, ffn_dim=32, layers=2, text_dim=8)
Shapes = dict[str, tuple[int, ...]]


def shapes_of(tensors: dict[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def write_header(path: Path, shapes: Shapes, dtype: str = "BF16", **metadata: str) -> Path:
    """Write a safetensors file of huge tensors as a sparse file: header on disk, data a hole."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * 2
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def wan_shapes(config: ModelConfig) -> Shapes:
    with torch.device("meta"):
        return shapes_of(WanTransformer(config).state_dict())


def with_patch(shapes: Shapes, channels: int, out: int = 64, dim: int = 128) -> Shapes:
    head = {"head.head.weight": (out, dim)}
    return {**shapes, "patch_embedding.weight": (dim, channels, 1, 2, 2), **head}


WAN = wan_shapes(SMALL)
UNSUPPORTED: dict[str, tuple[Shapes, str]] = {
    "clip": ({**WAN, "img_emb.proj.0.bias": (4,)}, "image-to-video.*CLIP image features"),
    "k_img": ({**WAN, "blocks.0.cross_attn.k_img.weight": (4, 4)}, "image-to-video"),
    "i2v": (with_patch(WAN, 36), "image-to-video.*36 input channels"),
    "5b": (with_patch(WAN, 48, 192), "Wan 2.2 TI2V 5B.*48 channels"),
    "control": (with_patch(WAN, 48), "control.*48 input channels"),
    "vace": ({**WAN, "vace_blocks.0.ffn.0.weight": (4, 4)}, "VACE"),
    "lora": ({"blocks.0.self_attn.q.lora_A.weight": (4, 4)}, "this is a LoRA: give it with"),
    "peft": ({"base_model.model.blocks.0.ffn.0.lora_B.default.weight": (4, 4)}, "LoRA"),
    "kohya": ({"lora_unet_blocks_0_ffn_0.lora_down.weight": (4, 4)}, "LoRA"),
    "vae": ({"encoder.conv1.weight": (8, 3, 3, 3, 3), "decoder.conv1.weight": (32, 16, 3, 3, 3),
             "conv2.weight": (16, 16, 1, 1, 1)}, "a Wan 2.1 VAE"),
    "vae22": ({"encoder.conv1.weight": (8,), "decoder.conv1.weight": (32,),
               "conv2.weight": (48, 48, 1, 1, 1)}, "the Wan 2.2 VAE.*48 channels"),
    "umt5": ({"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 4)},
             "T5 text encoder.*as the text encoder"),
    "wan t5": ({"token_embedding.weight": (9, 4), "blocks.0.attn.q.weight": (4, 4)}, "UMT5"),
    "diffusers": ({"blocks.0.attn1.to_q.weight": (4, 4)}, "diffusers layout.*ComfyUI loads"),
    "hybrid": ({**WAN, "blocks.0.self_attn.linear_proj.weight": (4, 4)}, "Hybrid Forcing"),
    "scaled": ({**WAN, "blocks.0.ffn.0.scale_weight": ()}, "scaled fp8.*Load Diffusion Model"),
    "width": (with_patch(WAN, 16, dim=192), "width 192 is not a multiple of 128"),
    "part": ({"blocks.7.self_attn.q.weight": (4, 4)}, "one part of a split transformer"),
    "clip vision": ({"vision_model.encoder.x": (4,)}, "CLIP vision"),
    "layers": ({**WAN, **{f"blocks.{i}.x": () for i in range(300)}}, "300 blocks"),
    "unknown": ({"something.weight": (4,)}, "no known kind of weights"),
    "nothing": ({}, "no known kind of weights"),
}  # fmt: skip
