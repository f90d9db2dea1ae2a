"""One forward of a causal Wan transformer, over any module tree with Wan's attribute names.

The tree may be our `WanTransformer` or a host's own module: only its submodules are called, so
whatever the host does inside them (LoRA, quantised or offloaded weights) keeps working. What the
frames of a call see of the past and the future is decided by `extend`, never here.

Legend: `sneakpeek_core.shapes`; S tokens of one latent frame, so T = F * S.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor

from ..shapes import LATENT_CHANNELS, PATCH
from .config import FREQ_DIM, HEAD_DIM
from .rope import Rope, rotate

# (q_BTND, k_BTND, v_BTND, mask) -> BTND. `mask` broadcasts to [B, N, Tq, Tk]: boolean (True is
# visible) or added to the logits.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
# (layer, k_BTND before RoPE, v_BTND, rope) -> keys (rotated), values, mask to attend with.
Extend = Callable[[int, Tensor, Tensor, Rope], tuple[Tensor, Tensor, Tensor | None]]
Layers = Sequence[tuple[Tensor, Tensor]]  # text keys and values, [B, L, N, D] each, per layer


def sdpa(q_BTND: Tensor, k_BTND: Tensor, v_BTND: Tensor, mask: Tensor | None) -> Tensor:
    """Plain scaled-dot-product attention: the default `Attend`."""
    q, k, v = (t.transpose(1, 2) for t in (q_BTND, k_BTND, v_BTND))
    return nnf.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def cast_like(parameter: Tensor, x: Tensor) -> Tensor:
    """Bring a bare parameter to the dtype and device of `x`: the default of `Host.cast`."""
    return parameter.to(dtype=x.dtype, device=x.device)


def patch_dtype(weight: Tensor) -> torch.dtype:
    """Return what patches are embedded in: the weight's own dtype, if it is one to compute in.

    Quantised weights (fp8, GGUF's bytes) are cast by their layer to whatever comes in.
    """
    computes = (torch.float32, torch.bfloat16, torch.float16)
    return weight.dtype if weight.dtype in computes else torch.float32


@dataclass(frozen=True, kw_only=True)
class Host:
    """What the surroundings provide: attention, how a bare parameter is brought to `x`, and what
    runs a layer (`run(layer, *arguments)`: training may throw its activations away and redo it).
    """

    attend: Attend = sdpa
    cast: Callable[[Tensor, Tensor], Tensor] = cast_like
    run: Callable[..., Tensor] = lambda layer, *arguments: layer(*arguments)


class TextRun(NamedTuple):
    """Neighbouring frames [start, stop) of a call that attend to the same text.

    Or to several texts side by side, if `mask` (see `Attend`) says which tokens see which.
    """

    start: int
    stop: int
    layers: Layers
    mask: Tensor | None = None


# Attributes that change what a Wan tree computes, and what they make of it.
_OTHER_KINDS = {
    "img_emb": "Wan image-to-video (CLIP image)",
    "vace_blocks": "VACE, which needs control frames",
    "vace_patch_embedding": "VACE, which needs control frames",
    "control_adapter": "a camera-control model",
    "ref_conv": "a Fun-Control model, which needs a reference image",
    "casual_audio_encoder": "an audio-driven model",
    "motion_encoder": "an animation model",
}
_NEEDED = (
    "patch_embedding", "text_embedding", "time_embedding", "time_projection", "blocks", "head",
)  # fmt: skip


def check_tree(tree: Any) -> None:
    """Raise `ValueError` when the tree is of a kind that cannot be streamed."""
    fix = "use a Wan 2.1 text-to-video (causal) checkpoint"
    for name, kind in _OTHER_KINDS.items():
        if getattr(tree, name, None) is not None:
            raise ValueError(f"the model has {name}: it is {kind}; {fix}")
    for name in _NEEDED:
        if not hasattr(tree, name):
            raise ValueError(f"a {type(tree).__name__} has no {name}, so it is no Wan tree; {fix}")
    if hasattr(tree.blocks[0].cross_attn, "k_img"):
        raise ValueError(f"the model has k_img: it attends to CLIP image tokens; {fix}")
    dim, channels = tree.patch_embedding.weight.shape[:2]
    if channels != LATENT_CHANNELS:
        raise ValueError(f"the model takes {channels} latent channels, not 16; {fix}")
    if dim % HEAD_DIM:
        raise ValueError(f"the model is {dim} wide, no multiple of {HEAD_DIM}; {fix}")


def wide(device: torch.device) -> torch.dtype:
    """Return the dtype for arithmetic that wants float64 (which MPS devices do not have)."""
    return torch.float32 if device.type == "mps" else torch.float64


def timestep_features(timesteps: Tensor) -> Tensor:
    """Return [..., 256] sinusoidal features of timesteps in [0, 1000]."""
    half = FREQ_DIM // 2
    dtype = wide(timesteps.device)
    exponents = torch.arange(half, dtype=dtype, device=timesteps.device) / half
    angles = timesteps.to(dtype).unsqueeze(-1) * 10000.0**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def text_layers(tree: Any, text_BLC: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the cross-attention keys and values of one text for every layer, [B, L, N, D].

    `text_BLC` is padded to the model's text length by the caller. They depend on the text alone,
    so they are made once per step of the schedule and not in every pass.
    """
    embedded = tree.text_embedding(text_BLC)
    return [
        (_heads(c.norm_k(c.k(embedded))), _heads(c.v(embedded)))
        for c in (block.cross_attn for block in tree.blocks)
    ]


def velocity(
    tree: Any,
    x_BCFHW: Tensor,
    timesteps_BF: Tensor,
    rope: Rope,
    text: Sequence[TextRun],
    extend: Extend,
    *,
    dtype: torch.dtype,
    host: Host,
) -> Tensor:
    """Return the flow (noise - clean) the model predicts for every latent frame, [B,C,F,H,W].

    `timesteps_BF` in [0, 1000], one per latent frame. `rope` and `text` cover the frames in
    order. Computes in `dtype`; the result is float32. Odd latent sizes are padded up to a whole
    token by wrapping round, as ComfyUI does, and cropped again.
    """
    height, width = x_BCFHW.shape[-2:]
    grid = (-(-height // PATCH), -(-width // PATCH))
    frames = x_BCFHW.shape[2]

    x = _embed_patches(tree, x_BCFHW, dtype)  # [B, F, S, C]
    times = tree.time_embedding(timestep_features(timesteps_BF).to(dtype))  # [B, F, C]
    modulation = tree.time_projection(times).unflatten(-1, (6, -1))  # [B, F, 6, C]

    for layer, block in enumerate(tree.blocks):
        x = host.run(_block, block, layer, x, modulation, rope, text, extend, host)

    shift, scale = (host.cast(tree.head.modulation, x) + times.unsqueeze(2)).unsqueeze(3).unbind(2)
    patches = tree.head.head(tree.head.norm(x) * (1 + scale) + shift)
    flow = rearrange(
        patches,
        "b f (h w) (pt ph pw c) -> b c (f pt) (h ph) (w pw)",
        f=frames, h=grid[0], pt=1, ph=PATCH, pw=PATCH,
    )  # fmt: skip
    return flow[..., :height, :width].float()


def _heads(x_BTC: Tensor) -> Tensor:
    return x_BTC.unflatten(-1, (-1, HEAD_DIM))


def _embed_patches(tree: Any, x_BCFHW: Tensor, dtype: torch.dtype) -> Tensor:
    height, width = x_BCFHW.shape[-2:]
    if height % PATCH or width % PATCH:
        pad = (0, -width % PATCH, 0, -height % PATCH, 0, 0)
        x_BCFHW = nnf.pad(x_BCFHW, pad, mode="circular")
    embedded = tree.patch_embedding(x_BCFHW.to(patch_dtype(tree.patch_embedding.weight)))
    return rearrange(embedded, "b c f h w -> b f (h w) c").to(dtype)


def _block(
    block: Any,
    layer: int,
    x: Tensor,
    modulation: Tensor,
    rope: Rope,
    text: Sequence[TextRun],
    extend: Extend,
    host: Host,
) -> Tensor:
    """One layer. `x` is [B, F, S, C], so that a frame's modulation is broadcast to its tokens."""
    parts = (host.cast(block.modulation, x) + modulation).unsqueeze(3).unbind(2)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = parts  # [B, F, 1, C] each
    shape = x.shape[1:3]

    modulated = (block.norm1(x) * (1 + scale) + shift).flatten(1, 2)
    attended = _self_attention(block.self_attn, layer, modulated, rope, extend, host)
    x = x + attended.unflatten(1, shape) * gate
    crossed = _cross_attention(block.cross_attn, layer, block.norm3(x), text, host)
    x = x + crossed.unflatten(1, shape)
    return x + block.ffn(block.norm2(x) * (1 + ffn_scale) + ffn_shift) * ffn_gate


def _self_attention(
    attention: Any, layer: int, x_BTC: Tensor, rope: Rope, extend: Extend, host: Host
) -> Tensor:
    q = rotate(_heads(attention.norm_q(attention.q(x_BTC))), rope)
    k = _heads(attention.norm_k(attention.k(x_BTC)))
    v = _heads(attention.v(x_BTC))
    return attention.o(host.attend(q, *extend(layer, k, v, rope)).flatten(2))


def _cross_attention(
    attention: Any, layer: int, x_BFSC: Tensor, text: Sequence[TextRun], host: Host
) -> Tensor:
    """Every frame attends to the text of its own step: one attention per run of equal texts."""
    q = _heads(attention.norm_q(attention.q(x_BFSC)))  # [B, F, S, N, D]
    runs = [
        host.attend(q[:, run.start : run.stop].flatten(1, 2), *run.layers[layer], run.mask)
        for run in text
    ]
    return attention.o((runs[0] if len(runs) == 1 else torch.cat(runs, dim=1)).flatten(2))
