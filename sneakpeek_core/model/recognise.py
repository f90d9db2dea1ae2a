"""Says what a set of tensors is, from names and shapes alone. No torch here.

One table of kinds, tried in order, so that loading, refusing and inspecting agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..shapes import LATENT_CHANNELS
from .config import HEAD_DIM, ModelConfig

MAX_LAYERS = 256  # modules cost time even without memory; Wan has 30 or 40
Shapes = Mapping[str, tuple[int, ...]]
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_LORA = re.compile(
    r"lora_[AB]\b|lora_(up|down)\b|\.lora\.(up|down)\b|lokr_w|hada_w|\.diff(_b)?$|^lora_"
)
_SCALES = re.compile(r"scale_weight$|scaled_fp8$|weight_scale(_2)?$|\.comfy_quant$")
_ORIGINAL = "use a text-to-video file in Wan 2.1's own layout"


@dataclass(frozen=True)
class Recognised:
    """What a file looks like: its kind, in words, and why it cannot be used ("" when it can)."""

    kind: str  # "transformer", "vae", "text encoder", "lora" or "unknown"
    label: str
    problem: str = ""


def recognise(shapes: Shapes) -> Recognised:
    """Return what tensors of these bare names and shapes are; never raises."""
    for matches, found in _KINDS:
        if matches(shapes):
            return found
    if _all("encoder.conv1.weight", "decoder.conv1.weight")(shapes):
        return _vae(shapes)
    if "patch_embedding.weight" in shapes and any(map(_BLOCK.match, shapes)):
        return _transformer(shapes)
    return Recognised("unknown", "no known kind of weights", _ORIGINAL)


def config_from_shapes(shapes: Shapes, text_len: int = 512) -> ModelConfig:
    """Return the sizes of the transformer whose tensors (by bare name) have these shapes.

    `ValueError` for every kind of file that is not a Wan 2.1 text-to-video transformer, saying
    what it looks like and what to use. `text_len` is not visible in tensors; Wan's is 512.
    """
    found = recognise(shapes)
    if found.kind != "transformer" or found.problem:
        raise ValueError(
            f"this looks like {found.label}, not a Wan 2.1 text-to-video transformer: "
            f"{found.problem or _ORIGINAL}"
        )
    ffn, text = shapes.get("blocks.0.ffn.0.weight"), shapes.get("text_embedding.0.weight")
    if ffn is None or text is None or len(ffn) != 2 or len(text) != 2:
        raise ValueError(f"the feed-forward or text embedding weights are missing; {_ORIGINAL}")
    layers = len({match[1] for name in shapes if (match := _BLOCK.match(name))})
    if layers > MAX_LAYERS:
        raise ValueError(f"it has {layers} blocks, at most {MAX_LAYERS} are allowed; {_ORIGINAL}")
    return ModelConfig(
        dim=shapes["patch_embedding.weight"][0],
        ffn_dim=ffn[0],
        layers=layers,
        text_dim=text[1],
        text_len=text_len,
    )


def _transformer(shapes: Shapes) -> Recognised:
    patch, head = shapes["patch_embedding.weight"], shapes.get("head.head.weight", (0,))
    label, problem = "a Wan 2.1 text-to-video transformer", ""
    if len(patch) != 5:
        problem = f"patch_embedding has shape {list(patch)}, expected 5 axes; {_ORIGINAL}"
    elif patch[1] == 36:
        label = "a Wan image-to-video transformer"
        problem = f"it takes 36 input channels, a text-to-video one 16; {_ORIGINAL}"
    elif patch[1] == 48 and head[0] == 4 * 48:
        label = "Wan 2.2 TI2V 5B"
        problem = "its latents have 48 channels, Wan 2.1's 16; use a 1.3B or 14B checkpoint"
    elif patch[1] != LATENT_CHANNELS:
        label = "a Wan control or inpainting transformer"
        problem = f"it takes {patch[1]} input channels, a text-to-video one 16; {_ORIGINAL}"
    elif patch[0] % HEAD_DIM or not patch[0]:
        problem = f"its width {patch[0]} is not a multiple of {HEAD_DIM}; {_ORIGINAL}"
    return Recognised("transformer", label, problem)


def _vae(shapes: Shapes) -> Recognised:
    channels = shapes.get("conv2.weight", (0,))[0]
    if channels == LATENT_CHANNELS:
        return Recognised("vae", "a Wan 2.1 VAE")
    label = "the Wan 2.2 VAE" if channels == 48 else "a VAE with other latents"
    return Recognised("vae", label, f"its latents have {channels} channels, not 16; {_WAN_VAE}")


def _any(*fragments: str) -> Callable[[Shapes], bool]:
    return lambda shapes: any(f in name for name in shapes for f in fragments)


def _all(*names: str) -> Callable[[Shapes], bool]:
    return lambda shapes: all(name in shapes for name in names)


def _is_lora(shapes: Shapes) -> bool:
    base = "patch_embedding.weight" in shapes
    return not base and any(_LORA.search(name) for name in shapes)


def _is_scaled(shapes: Shapes) -> bool:
    blocks = any(map(_BLOCK.match, shapes))
    return blocks and any(_SCALES.search(name) for name in shapes)


def _is_part(shapes: Shapes) -> bool:
    return "patch_embedding.weight" not in shapes and _any(".self_attn.", ".cross_attn.")(shapes)


_WAN_VAE = "use Wan 2.1's VAE (wan_2.1_vae.safetensors or Wan2.1_VAE.pth)"
_TEXT = "give it as the text encoder"

# The first match wins: what marks a variant comes before what all variants share.
_KINDS: tuple[tuple[Callable[[Shapes], bool], Recognised], ...] = (
    (_is_lora, Recognised("lora", "a LoRA", "this is a LoRA: give it with the base model's file")),
    (
        _is_scaled,
        Recognised(
            "transformer",
            "a transformer with scaled fp8 weights",
            "its scales are not applied here; load it with ComfyUI's Load Diffusion Model node, "
            "or use an fp16 or bf16 file",
        ),
    ),
    (
        _any("vace_blocks.", "vace_patch_embedding."),
        Recognised(
            "transformer", "a Wan VACE transformer", f"its control blocks are unused; {_ORIGINAL}"
        ),
    ),
    (
        _any("img_emb.", ".k_img.", "condition_embedder.image_embedder."),
        Recognised(
            "transformer",
            "a Wan image-to-video transformer",
            f"it is conditioned on CLIP image features; {_ORIGINAL}",
        ),
    ),
    (
        _any("blocks.0.attn1.to_q.", "condition_embedder."),
        Recognised(
            "transformer",
            "a transformer in the diffusers layout",
            f"its tensors have diffusers' names; {_ORIGINAL}, the one ComfyUI loads",
        ),
    ),
    (
        _any(".self_attn.linear_proj."),
        Recognised(
            "transformer",
            "a Hybrid Forcing transformer",
            f"its linear attention is not implemented; {_ORIGINAL}",
        ),
    ),
    (
        _any("SelfAttention.relative_attention_bias."),
        Recognised("text encoder", "a T5 text encoder (Hugging Face names)", _TEXT),
    ),
    (
        _all("token_embedding.weight", "blocks.0.attn.q.weight"),
        Recognised("text encoder", "a UMT5 text encoder (Wan's names)", _TEXT),
    ),
    (
        _all("embedding.weight", "to_text.weight", "attention.qkv.weight"),
        Recognised("text encoder", "SneakPeek's tiny text encoder", _TEXT),
    ),
    (
        _any("text_model.encoder."),
        Recognised("text encoder", "a CLIP text encoder", "Wan models use UMT5-XXL instead"),
    ),
    (
        _any("vision_model.", "visual.transformer."),
        Recognised("unknown", "a CLIP vision model", f"nothing here needs it; {_ORIGINAL}"),
    ),
    (
        _all("encoder.conv_in.weight", "decoder.conv_in.weight"),
        Recognised("vae", "a VAE in the diffusers layout", _WAN_VAE),
    ),
    (
        _all("encoder.0.weight", "decoder.1.weight"),
        Recognised("vae", "a tiny preview VAE (TAEHV)", f"it cannot start a stream; {_WAN_VAE}"),
    ),
    (
        _is_part,
        Recognised(
            "transformer",
            "one part of a split transformer",
            f"its other parts are in other files; {_ORIGINAL} that is one file",
        ),
    ),
)
