"""Stage 1, predictive causal adaptation: one forward learns to denoise chunks and keyframes.

Teacher forcing over whole videos through the engine's own forward and masks. Drawn at random are
chunk length, window, sink, when and how far ahead plans are made, how clean the past and the
keyframes are, and whether a keyframe was predicted or given. Not trained: keyframes denoised
jointly with a chunk, a video without a start picture, and a start clip of more than one frame.
The target is the flow, noise - clean (rectified flow), at noise levels warped by the shift.

Legend: as in `sequences`.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..guidance import FutureGuidance
from ..model.config import HEAD_DIM, ModelConfig
from ..model.forward import Host, TextRun, text_layers, velocity
from ..model.parallel import MaskedExtend
from ..model.presets import PRESETS, Preset, stated_fields
from ..model.rope import Rope, rope_for
from ..model.transformer import Block, WanTransformer
from ..model.weights import LoadedModel, save_model
from ..shapes import PATCH
from ..sigmas import TRAIN_STEPS
from .attention import attend
from .layout import LayoutRecipe, SketchRecipe
from .lora import LoraRecipe, add_lora, save_lora
from .own_past import OwnPastRecipe, with_own_past
from .recipe import LICENCE, Optimiser, Run, random_for
from .sequences import KINDS, Batch, NoiseRecipe, Sequences, Videos


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """Sizes of a transformer that starts from random weights."""

    dim: int = 256
    ffn_dim: int = 1024
    layers: int = 6
    text_dim: int = 4096
    text_len: int = 512


@dataclass(frozen=True, kw_only=True)
class SamplingRecipe:
    """How the trained weights are to be sampled: stated in their file, nothing of it is trained."""

    chunk: int = 3
    sampling_steps: int = 4
    window: int = 12
    sink: int = 1
    guided: bool = True
    horizon: int = 1  # keyframes ahead
    plan_passes: int | None = None


@dataclass(frozen=True, kw_only=True)
class CausalRecipe:
    """Stage 1, as its TOML file states it."""

    run: Run
    optimiser: Optimiser = field(default_factory=Optimiser)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    layout: LayoutRecipe = field(default_factory=LayoutRecipe)
    sketch: SketchRecipe = field(default_factory=SketchRecipe)
    noise: NoiseRecipe = field(default_factory=NoiseRecipe)
    own_past: OwnPastRecipe = field(default_factory=OwnPastRecipe)
    sampling: SamplingRecipe | None = None  # none: as the model that training started from
    lora: LoraRecipe | None = None  # none: all weights are trained
    start: str = ""  # a transformer to go on from; none: random weights
    vae: str = ""  # what encodes the videos; none: the tiny one
    text_encoder: str = ""
    shift: float | None = None  # of noise levels, as they are sampled; none: the start's own
    span: int = 21  # latent frames of a sequence; longer videos are cut anew each time
    batch: int = 8
    keyframe_weight: float = 3.0  # of a keyframe's error against a chunk frame's
    held_out: int = 32  # videos that are only evaluated
    checkpointing: bool = False  # of activations: a third slower, a fraction of the memory


class CausalLoss(nn.Module):
    """The transformer and its loss as one module, so that every launcher can wrap its forward."""

    def __init__(
        self,
        tree: WanTransformer,
        span: int,
        checkpointing: bool = False,
        own_past: OwnPastRecipe | None = None,
    ):
        super().__init__()
        self.tree = tree
        self.span = span
        self.own_past = own_past
        self.host = Host(attend=attend)
        if checkpointing:
            self.host = replace(self.host, run=partial(checkpoint, use_reentrant=False))

    def forward(self, *parts: Tensor) -> dict[str, Tensor]:
        """Return `loss`, and the error of each kind of frame, overall and from high noise."""
        batch = Batch(*parts)
        if self.own_past is not None and self.training:
            batch = with_own_past(batch, self.own_past, self.flow)
        flow = self.flow(batch).to(batch.flow_BCFHW.dtype)
        error_BF = (flow - batch.flow_BCFHW).square().mean((1, 3, 4))
        losses = {"loss": (batch.weights_BF * error_BF).sum() / batch.weights_BF.sum()}
        error_BF = error_BF.detach()
        for index, kind in enumerate(KINDS):
            for name, chosen in (
                (kind, batch.kinds_BF == index),
                (f"{kind}_noisy", (batch.kinds_BF == index) & (batch.sigmas_BF > 0.5)),
            ):
                count = chosen.sum()
                mean = (error_BF * chosen).sum() / count.clamp(min=1)
                losses[name] = torch.where(count > 0, mean, torch.nan)
        return losses

    def flow(self, batch: Batch) -> Tensor:
        """Return the predicted flow BCFHW."""
        rows, columns = (-(-side // PATCH) for side in batch.x_BCFHW.shape[-2:])
        tokens = rows * columns
        device = batch.x_BCFHW.device
        table = rope_for(range(self.span), rows, columns, head_dim=HEAD_DIM, device=device).turns
        turns = table.view(self.span, tokens, -1)[batch.positions_BF]  # [B, F, S, D/2]
        layers = [
            (
                k.unflatten(0, batch.texts_BKLD.shape[:2]).flatten(1, 2),
                v.unflatten(0, batch.texts_BKLD.shape[:2]).flatten(1, 2),
            )
            for k, v in text_layers(self.tree, batch.texts_BKLD.flatten(0, 1))
        ]
        bias = batch.text_bias_BFKL.flatten(2).repeat_interleave(tokens, 1).unsqueeze(1)
        run = TextRun(0, batch.x_BCFHW.shape[2], layers, bias)
        return velocity(
            self.tree, batch.x_BCFHW, batch.sigmas_BF * TRAIN_STEPS,
            Rope(turns.flatten(1, 2).unsqueeze(2)), [run],
            MaskedExtend(batch.mask_BFF, tokens),
            dtype=batch.x_BCFHW.dtype, host=self.host,
        )  # fmt: skip


class CausalStage:
    """What the training loop asks of a stage."""

    def __init__(
        self,
        recipe: CausalRecipe,
        videos: Videos,
        start: LoadedModel | None = None,
        described: dict[str, Any] | None = None,
        fps: float = 16.0,
    ):
        self.recipe = recipe
        self.videos = videos
        self._described = described or {}
        self._start = start
        check_held_out(recipe, len(videos))
        tree = initial_transformer(recipe) if start is None else start.tree.requires_grad_(True)
        if recipe.lora is not None:
            add_lora(tree, recipe.lora, recipe.run.seed)
        own_past = recipe.own_past if recipe.own_past.share else None
        self.module = CausalLoss(tree, recipe.span, recipe.checkpointing, own_past)
        preset = PRESETS["tiny"] if start is None else start.preset
        shift = preset.shift if recipe.shift is None else recipe.shift
        self._preset = trained_preset(preset, recipe, shift, fps)
        self._sequences = Sequences(
            layout=recipe.layout,
            noise=recipe.noise,
            shift=shift,
            keyframe_weight=recipe.keyframe_weight,
            span=recipe.span,
            text_len=tree.config.text_len,
            videos=videos,
            positions=self._preset.positions,
            own_past=recipe.own_past.share,
        )
        self._true_pasts = replace(self._sequences, own_past=0.0)

    def matrices(self) -> list[nn.Parameter]:
        """Return the weights inside the layers: what is multiplied on both sides by activations."""
        blocks = self.module.tree.blocks
        return [p for p in blocks.parameters() if p.ndim == 2 and p.requires_grad]

    def batch(self, step: int, process: int) -> Batch:
        """Return the batch of a step in a process: a function of these and the seed."""
        rng, sketch = random_for(self.recipe.run.seed, step, process), self.recipe.sketch
        trained = range(self.recipe.held_out, len(self.videos))
        sketched = sketch.share > 0 and rng.random() < sketch.share
        count = sketch.batch if sketched else self.recipe.batch
        chosen = [rng.choice(trained) for _ in range(count)]
        begun = step >= self.recipe.own_past.begin * self.recipe.run.steps
        sequences = self._sequences if begun else self._true_pasts
        return sequences.batch(chosen, rng, sketch if sketched else None)

    @torch.no_grad()
    def evaluate(self, module: CausalLoss) -> dict[str, float]:
        """Return the losses on videos not trained on: true pasts, always with the same noise."""
        sums: dict[str, list[float]] = {}
        device = next(module.parameters()).device
        for first in range(0, self.recipe.held_out, self.recipe.batch):
            rows = range(first, min(first + self.recipe.batch, self.recipe.held_out))
            batch = self._true_pasts.batch(rows, random_for("held out", first))
            for name, value in module(*(x.to(device) for x in batch)).items():
                if not math.isnan(float(value)):
                    sums.setdefault(f"held_out_{name}", []).append(float(value))
        return {name: sum(values) / len(values) for name, values in sums.items()}

    def save(self, module: CausalLoss, path: Path) -> None:
        """Write the transformer, or the adapters, with what the sampler must know about it."""
        if self.recipe.lora is not None:
            save_lora(module.tree, path, self._metadata())
        else:
            save_model(path, module.tree.state_dict(), self._metadata())

    def release(self, module: CausalLoss, path: Path) -> None:
        """Write the same in bf16."""
        rounded = copy.deepcopy(module).cpu().to(torch.bfloat16)
        self.save(rounded, path)

    def _metadata(self) -> dict[str, Any]:
        text_len = self.module.tree.config.text_len
        recipe = json.dumps(asdict(self.recipe) | self._described)
        licence = {"license": LICENCE} if self._start is None else {}
        stated = {**stated_fields(self._preset), "text_len": text_len}
        return {"sneakpeek": stated, "recipe": recipe, **licence}


def check_held_out(recipe: CausalRecipe, videos: int) -> None:
    """Raise `ValueError` if so many videos are held out that none is left to train on."""
    if videos <= recipe.held_out:
        raise ValueError(
            f"held_out {recipe.held_out} leaves nothing to train on of {videos} videos; use "
            f"{videos // 10} or fewer"
        )


def trained_preset(start: Preset, recipe: CausalRecipe, shift: float, fps: float) -> Preset:
    """Return how the trained weights are to be sampled: as the start, but for what was trained."""
    preset = replace(start, trained_span=recipe.span, shift=shift, fps=fps, refusal="")
    sampling = recipe.sampling
    if sampling is None:
        return preset
    guidance = FutureGuidance(count=sampling.horizon, plan_passes=sampling.plan_passes)
    return replace(
        preset,
        chunk=sampling.chunk,
        steps=sampling.sampling_steps,
        window=sampling.window,
        sink=sampling.sink,
        guidance=guidance if sampling.guided else None,
    )


def sizes_of(tree: WanTransformer) -> ModelRecipe:
    """Return a transformer's sizes as a recipe states them."""
    return ModelRecipe(**asdict(tree.config))


def initial_transformer(recipe: CausalRecipe) -> WanTransformer:
    """Return a transformer to train from scratch; it predicts no flow at first."""
    sizes = recipe.model
    config = ModelConfig(
        dim=sizes.dim, ffn_dim=sizes.ffn_dim, layers=sizes.layers, text_dim=sizes.text_dim,
        text_len=sizes.text_len,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        tree = WanTransformer(config)
    with torch.no_grad():
        tree.head.head.weight.zero_()
        assert tree.head.head.bias is not None
        tree.head.head.bias.zero_()
        for block in tree.blocks:
            # what a layer adds starts small, so that depth does not matter at first
            assert isinstance(block, Block)
            for last in (block.self_attn.o, block.cross_attn.o, block.ffn[-1]):
                assert isinstance(last, nn.Linear)
                last.weight.mul_(1 / math.sqrt(2 * sizes.layers))
    return tree
