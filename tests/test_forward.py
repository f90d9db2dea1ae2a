"""The forward equals diffusers' WanTransformer3DModel, and does what its seams promise."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from sneakpeek_core.model import forward
from sneakpeek_core.model.config import HEAD_DIM, ModelConfig
from sneakpeek_core.model.forward import (
    Extend,
    Host,
    TextRun,
    _embed_patches,
    check_tree,
    sdpa,
    text_layers,
    velocity,
)
from sneakpeek_core.model.initial import random_transformer
from sneakpeek_core.model.rope import Rope, band_sizes, rope_for, rotate
from sneakpeek_core.model.transformer import WanTransformer

TOLERANCE = 2e-5
SMALL = ModelConfig(dim=128, ffn_dim=192, layers=2, text_dim=24, text_len=6)
NAMES = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_out.0": "cross_attn.o",
    "attn1.to_": "self_attn.",
    "attn2.to_": "cross_attn.",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


def our_name(theirs: str) -> str:
    if theirs == "scale_shift_table":
        return "head.modulation"
    name = theirs.replace("scale_shift_table", "modulation")
    for their_part, our_part in NAMES.items():
        if their_part in name:
            return name.replace(their_part, our_part)
    return name


def reference_of(config: ModelConfig, tree: WanTransformer) -> WanTransformer3DModel:
    """Build their model with our parameters; every name and shape must have its counterpart."""
    model = WanTransformer3DModel(
        num_attention_heads=config.heads,
        attention_head_dim=HEAD_DIM,
        text_dim=config.text_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.layers,
    )
    ours = tree.state_dict()
    names = {theirs: our_name(theirs) for theirs in model.state_dict()}
    assert sorted(names.values()) == sorted(ours)
    model.load_state_dict({theirs: ours[name] for theirs, name in names.items()}, strict=True)
    return model.eval()


def made(config: ModelConfig, seed: int = 0) -> WanTransformer:
    return random_transformer(config, seed).eval().requires_grad_(False)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def alone(layer: int, k: Tensor, v: Tensor, rope: Rope) -> tuple[Tensor, Tensor, None]:
    """The whole call and nothing else: the bidirectional model."""
    return rotate(k, rope), v, None


def rope_of(x_BCFHW: Tensor, first: float = 0.0) -> Rope:
    frames, height, width = x_BCFHW.shape[2:]
    positions = [first + frame for frame in range(frames)]
    return rope_for(positions, math.ceil(height / 2), math.ceil(width / 2), head_dim=HEAD_DIM)


def flow_of(
    tree: WanTransformer,
    x: Tensor,
    timesteps_BF: Tensor,
    runs: list[TextRun],
    extend: Extend = alone,
    *,
    first: float = 0.0,
    dtype: torch.dtype = torch.float32,
    host: Host | None = None,
) -> Tensor:
    rope = rope_of(x, first)
    return velocity(tree, x, timesteps_BF, rope, runs, extend, dtype=dtype, host=host or Host())


def ours_of(tree: WanTransformer, x: Tensor, timesteps_BF: Tensor, text: Tensor) -> Tensor:
    return flow_of(tree, x, timesteps_BF, [TextRun(0, x.shape[2], text_layers(tree, text))])


@pytest.fixture(scope="module")
def tree() -> WanTransformer:
    return made(SMALL)


# -- parity ----------------------------------------------------------------------------------------

CASES = [
    # dim, layers, text_dim, text tokens, batch, frames, latent height, latent width
    (128, 1, 16, 1, 1, 1, 2, 2),
    (128, 3, 40, 9, 2, 3, 6, 10),  # 3x5 tokens
    (256, 2, 24, 12, 1, 5, 4, 6),
    (256, 1, 64, 5, 2, 2, 6, 6),
    (128, 2, 16, 7, 1, 4, 2, 14),
    (128, 2, 24, 4, 2, 3, 5, 7),  # wraps round to 3x4 tokens
    (256, 1, 24, 4, 1, 2, 7, 6),
    (128, 1, 24, 4, 1, 2, 4, 3),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("per_frame", [False, True], ids=["uniform", "per-frame"])
@torch.no_grad()
def test_equals_diffusers(case: tuple[int, ...], per_frame: bool):
    """All frames in one call equal diffusers' model with the same weights, also at odd latent
    sizes (theirs gets the latents wrapped round to whole tokens) and with timesteps per frame."""
    dim, layers, text_dim, tokens, batch, frames, height, width = case
    config = ModelConfig(dim=dim, ffn_dim=dim + 64, layers=layers, text_dim=text_dim)
    tree = made(config, seed=dim + layers)
    x = normal(batch, 16, frames, height, width, seed=1)
    text = normal(batch, tokens, text_dim, seed=2)
    # Theirs takes sines of float32 angles: at timesteps like these both are exact enough.
    rng = torch.Generator().manual_seed(3)
    if per_frame:
        timesteps = torch.rand(batch, frames, generator=rng) * 100
        timesteps[0, 0] = 0.0
    else:
        timesteps = (torch.rand(batch, 1, generator=rng) * 100).expand(batch, frames)

    ours = ours_of(tree, x, timesteps, text)

    wrapped = torch.cat([x, x[..., : height % 2, :]], dim=3)
    wrapped = torch.cat([wrapped, wrapped[..., : width % 2]], dim=4)
    tokens_per_frame = (wrapped.shape[3] // 2) * (wrapped.shape[4] // 2)
    told = timesteps.repeat_interleave(tokens_per_frame, dim=1) if per_frame else timesteps[:, 0]
    theirs = reference_of(config, tree)(wrapped, told, text, return_dict=False)[0]
    assert ours.shape == x.shape
    assert theirs.abs().mean() > 0.3, "an output near zero would prove nothing"
    assert (ours - theirs[..., :height, :width]).abs().max() < TOLERANCE


@pytest.mark.parametrize("timestep", [0.0, 4.98, 555.5556, 625.0, 937.5, 1000.0])
@torch.no_grad()
def test_equals_diffusers_at_the_timesteps_of_few_step_models(tree, timestep: float):
    """Parity holds over the whole range of timesteps, fractions included: 937.5 stays 937.5."""
    x, text = normal(1, 16, 2, 4, 4, seed=4), normal(1, 5, SMALL.text_dim, seed=5)
    ours = ours_of(tree, x, torch.full((1, 2), timestep), text)
    reference = reference_of(SMALL, tree)
    theirs = reference(x, torch.tensor([timestep]), text, return_dict=False)[0]
    assert (ours - theirs).abs().max() < 1e-4  # theirs: float32 angles of up to 1000 radians
    if timestep == 937.5:
        rounded = reference(x, torch.tensor([937.0]), text, return_dict=False)[0]
        assert (ours - rounded).abs().max() > 1e-3


def test_random_weights_hide_nothing(tree):
    """Every parameter the parity tests compare under is away from 0, gains are away from 1."""
    for name, parameter in tree.named_parameters():
        assert parameter.std() > 1e-3, name
        assert (parameter == 0).float().mean() < 0.01, name


# -- text ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_frame_attends_to_its_own_text(tree):
    """With self-attention kept within frames, two texts in one call equal every frame alone."""
    x, timesteps = normal(2, 16, 5, 4, 6, seed=6), torch.rand(2, 5) * 1000
    texts = [text_layers(tree, normal(2, 4, SMALL.text_dim, seed=s)) for s in (7, 8)]
    frame_of_token = torch.arange(5).repeat_interleave(6)
    mask = frame_of_token[:, None] == frame_of_token[None]

    def isolated(layer: int, k: Tensor, v: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        return rotate(k, rope), v, mask

    runs = [TextRun(0, 2, texts[0]), TextRun(2, 3, texts[1]), TextRun(3, 5, texts[0])]
    together = flow_of(tree, x, timesteps, runs, isolated)
    for frame, text in enumerate([0, 0, 1, 0, 0]):
        one = slice(frame, frame + 1)
        single, other = (
            flow_of(
                tree, x[:, :, one], timesteps[:, one], [TextRun(0, 1, texts[which])],
                first=float(frame),
            )
            for which in (text, 1 - text)
        )  # fmt: skip
        assert (together[:, :, one] - single).abs().max() < TOLERANCE
        assert (together[:, :, one] - other).abs().max() > 1e-2


# -- what the host provides ------------------------------------------------------------------------


@torch.no_grad()
def test_injected_attention_is_the_only_attention(tree, monkeypatch):
    """`attend` makes every attention: one a layer for the frames and one a layer and text."""
    x, timesteps = normal(1, 16, 3, 4, 4, seed=9), torch.full((1, 3), 500.0)
    texts = [text_layers(tree, normal(1, 4, SMALL.text_dim, seed=s)) for s in (10, 11)]
    runs = [TextRun(0, 1, texts[0]), TextRun(1, 3, texts[1])]
    expected = flow_of(tree, x, timesteps, runs)
    queries: list[int] = []

    def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        queries.append(q.shape[1])
        logits = torch.einsum("bqnd,bknd->bnqk", q, k) / math.sqrt(HEAD_DIM)
        return torch.einsum("bnqk,bknd->bqnd", logits.softmax(-1), v)

    def forbidden(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("attention behind the host's back")

    monkeypatch.setattr(forward.nnf, "scaled_dot_product_attention", forbidden)
    injected = flow_of(tree, x, timesteps, runs, host=Host(attend=by_hand))
    assert queries == [12, 4, 8] * SMALL.layers
    assert (injected - expected).abs().max() < TOLERANCE
    with pytest.raises(AssertionError, match="behind"):
        flow_of(tree, x, timesteps, runs)


def test_sdpa_takes_boolean_and_additive_masks():
    """The default attention hides what a boolean mask excludes, and adds a float mask."""
    q, k, v = (normal(1, 3, 2, HEAD_DIM, seed=s) for s in (12, 13, 14))
    visible = torch.tensor([True, False, True])[None, None, None]
    added = torch.zeros(1, 1, 1, 3).masked_fill(~visible, float("-inf"))
    expected = sdpa(q, k[:, ::2], v[:, ::2], None)
    for mask in (visible, added):
        assert torch.allclose(sdpa(q, k, v, mask), expected, atol=1e-6)


@torch.no_grad()
def test_host_casts_both_modulations(tree):
    """The bare parameters (a modulation per layer and the head's) pass through `Host.cast`,
    with the activations to match, and what it returns is what is used."""
    x, timesteps = normal(1, 16, 2, 4, 4, seed=15), torch.full((1, 2), 300.0)
    run = TextRun(0, 2, text_layers(tree, normal(1, 4, SMALL.text_dim, seed=16)))
    stored = made(SMALL)
    bare = [*(block.modulation for block in stored.blocks), stored.head.modulation]
    for parameter in bare:  # held in a way that only the host can read
        parameter.data = (parameter.data + 7.0).double()
    seen: list[int] = []

    def cast(parameter: Tensor, like: Tensor) -> Tensor:
        seen.append(id(parameter))
        assert like.dtype == torch.float32
        return (parameter - 7.0).to(like)

    through_host = flow_of(stored, x, timesteps, [run], host=Host(cast=cast))
    expected = flow_of(tree, x, timesteps, [run])
    assert seen == [id(parameter) for parameter in bare]
    assert (through_host - expected).abs().max() < TOLERANCE


@torch.no_grad()
def test_bfloat16_runs_and_is_close(tree):
    """In bf16 (patch embedding left in fp32, as hosts do) the result is fp32 and close."""
    x, timesteps = normal(2, 16, 3, 4, 6, seed=17), torch.rand(2, 3) * 1000
    text = normal(2, 6, SMALL.text_dim, seed=18)
    exact = ours_of(tree, x, timesteps, text)
    half = made(SMALL).bfloat16()
    half.patch_embedding.float()
    run = TextRun(0, 3, text_layers(half, text.bfloat16()))
    rough = flow_of(half, x, timesteps, [run], dtype=torch.bfloat16)
    error = (rough - exact).norm() / exact.norm()
    assert rough.dtype == torch.float32
    assert 1e-4 < error < 0.03


# -- trees that cannot be streamed -----------------------------------------------------------------


def fake_tree(channels: int = 16, **more: Any) -> SimpleNamespace:
    cross = SimpleNamespace(**more.pop("cross", {}))
    weight = torch.empty(more.pop("dim", 128), channels, 1, 2, 2, device="meta")
    rest = ("text_embedding", "time_embedding", "time_projection", "head")
    return SimpleNamespace(
        **dict.fromkeys(rest, object()),
        blocks=[SimpleNamespace(cross_attn=cross)],
        patch_embedding=SimpleNamespace(weight=weight),
        **more,
    )


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (fake_tree(img_emb=object()), "img_emb: it is Wan image-to-video .* use a Wan 2.1 text-"),
        (fake_tree(cross={"k_img": object()}), "k_img: it attends to CLIP image tokens; use a"),
        (fake_tree(36), "takes 36 latent channels, not 16; use a Wan 2.1 text-to-video"),
        (fake_tree(48), "takes 48 latent channels, not 16; use a Wan 2.1 text-to-video"),
        (fake_tree(dim=320), "320 wide, no multiple of 128; use a Wan 2.1 text-to-video"),
        (fake_tree(vace_blocks=object()), "vace_blocks: it is VACE, .* frames; use a Wan 2.1"),
        (torch.nn.Linear(2, 2), "a Linear has no patch_embedding, so it is no Wan tree; use a"),
    ],
    ids=["img_emb", "k_img", "36", "48", "width", "vace", "linear"],
)
def test_other_kinds_of_models_are_refused_in_words(tree, words: str):
    """Image-to-video and other latent spaces are refused by what was found, with what to use."""
    with pytest.raises(ValueError, match=words):
        check_tree(tree)


def test_text_to_video_is_accepted(tree):
    """Our own tree passes, and so does one that carries an `img_emb` of None."""
    check_tree(tree)
    check_tree(fake_tree(img_emb=None))


# -- RoPE ------------------------------------------------------------------------------------------


def turned(x_FRCND: Tensor, positions: list[float]) -> Tensor:
    """Multiply neighbouring pairs by exp(i * position * 10000^(-j/n)), in complex128."""
    frames, rows, columns = x_FRCND.shape[:3]
    bands = []
    for axis, (pairs, places) in enumerate(
        zip((22, 21, 21), (positions, range(rows), range(columns)), strict=True)
    ):
        rates = torch.tensor([10000.0 ** (-j / pairs) for j in range(pairs)], dtype=torch.float64)
        angles = torch.tensor([float(p) for p in places], dtype=torch.float64)[:, None] * rates
        shape = [1, 1, 1, pairs]
        shape[axis] = len(angles)
        bands.append(angles.reshape(shape).expand(frames, rows, columns, pairs))
    angles = torch.cat(bands, dim=-1).unsqueeze(3)
    pairs = torch.view_as_complex(x_FRCND.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def test_bands_of_a_wan_head():
    """Of 64 pairs, 22 turn with time, 21 with the row and 21 with the column."""
    assert band_sizes(128) == (22, 21, 21)


@pytest.mark.parametrize(
    "positions",
    [[0.0, 1.0, 2.0], [1023.0, 1024.0], [5000.0], [0.5, 20.25, 5000.75]],
    ids=["first", "table end", "5000", "fractions"],
)
def test_rope_is_complex_multiplication(positions: list[float]):
    """Rotation equals multiplication by unit complex numbers made in float64, at any position."""
    x = normal(len(positions), 3, 4, 2, 128, seed=19)
    rope = rope_for(positions, 3, 4, head_dim=128)
    ours = rotate(x.flatten(0, 2).unsqueeze(0), rope)
    expected = turned(x, positions).flatten(0, 2).unsqueeze(0)
    assert rope.turns.shape == (len(positions) * 12, 1, 64)
    assert (ours - expected).abs().max() < 2e-6


@pytest.mark.parametrize("shift", [1.0, 7.0, 1000.5, 4000.0])
def test_attention_sees_differences_of_positions_only(shift: float):
    """q.k after rotation is the same when both move along in time by the same amount."""
    q, k = (normal(1, 12, 2, 128, seed=s) for s in (20, 21))

    def logits(move: float, apart: float = 9.0) -> Tensor:
        at, ahead = (rope_for([p + move], 3, 4, head_dim=128) for p in (2.0, 2.0 + apart))
        return torch.einsum("bqnd,bknd->bnqk", rotate(q, at), rotate(k, ahead))

    assert (logits(shift) - logits(0.0)).abs().max() < 5e-5
    assert (logits(0.0, apart=10.0) - logits(0.0)).abs().max() > 0.1


def test_rotation_keeps_dtype_and_length():
    """bf16 in, bf16 out, from float32 arithmetic; no vector changes its length."""
    x = normal(1, 4, 1, 128, seed=22)
    rope = rope_for([3.0], 2, 2, head_dim=128)
    assert torch.allclose(rotate(x, rope).norm(dim=-1), x.norm(dim=-1), rtol=1e-6)
    rough = x.bfloat16()
    assert torch.equal(rotate(rough, rope), rotate(rough.float(), rope).bfloat16())


def test_odd_edges_wrap_round(tree):
    """A latent of 5x7 cells is seen as 6x8 with its first row and column repeated behind."""
    x = normal(1, 16, 1, 5, 7, seed=23)
    wrapped = nnf.pad(x, (0, 1, 0, 1, 0, 0), mode="circular")
    text, timesteps = normal(1, 3, SMALL.text_dim, seed=24), torch.full((1, 1), 700.0)
    small, large = (ours_of(tree, part, timesteps, text) for part in (x, wrapped))
    assert torch.equal(small, large[..., :5, :7])


class OnUse(torch.nn.Module):
    """A layer as hosts make them: weights in a storage dtype, cast to what comes in."""

    def __init__(self, layer: torch.nn.Module, storage: torch.dtype):
        super().__init__()
        self.layer = layer
        self.weight = layer.weight.to(storage)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32, "the layer computes in what it is given"
        return self.layer(x)


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.uint8])
@torch.no_grad()
def test_a_host_may_store_weights_in_any_dtype(storage: torch.dtype):
    """Latents are never rounded to the storage dtype of a quantised patch embedding."""
    tree = random_transformer(ModelConfig(dim=128, ffn_dim=128, layers=1, text_dim=8), 0)
    x = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = _embed_patches(tree, x, torch.float32)
    tree.patch_embedding = OnUse(tree.patch_embedding, storage)  # type: ignore[assignment]
    assert torch.equal(_embed_patches(tree, x, torch.float32), expected)
