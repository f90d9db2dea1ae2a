"""Stage 0: the video VAE, from random weights.

Loss: absolute and squared error and the error of spatial differences, heavier where a clip is
unlike its ground and where it moves, a small KL, and how restless the code of resting things is.
Crops train it; the last phase sees whole frames.
Legend: B batch, C channels, F frames, H height, W width.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.weights import KIND, load_vae, save_model
from ..shapes import LATENT_CHANNELS, SPATIAL, TEMPORAL, latent_frames_of
from ..vae.streaming import decode_video, encode_image, encode_video, posterior
from ..vae.wan import LATENT_MEAN, LATENT_STD, Conv3d, ResidualBlock, WanVAE, compile_norms
from .clips import Clips, is_vivid
from .recipe import LICENCE, Optimiser, Run, check_shares, random_for
from .sources import ToyData

WHOLE_CLIP = 1 << 30  # latent frames in one call
HELD_OUT = 8  # videos
MEASURED = 64  # videos whose latents say what mean and deviation are


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of the run: how many steps, on clips of how many frames, cut how large."""

    steps: int
    frames: int
    batch: int
    side: int


@dataclass(frozen=True, kw_only=True)
class VaeRecipe:
    """Stage 0, as its TOML file states it."""

    run: Run
    optimiser: Optimiser
    phases: tuple[Phase, ...]
    dim: int = 16
    kl: float = 1e-4
    edges: float = 0.5  # weight of the error of spatial differences
    weighted_edges: float = 0.0  # weight of the same, heavier where pixels are
    foreground: float = 4.0  # added weight of pixels unlike the ground
    moving: float = 4.0  # added weight of pixels that change
    vivid: float = 0.0  # added weight of those next to a strong colour that changes
    on_motion: float = 0.0  # share of crops around what moves, of those around anything
    data: ToyData = field(default_factory=lambda: ToyData(videos=800))
    start: str = ""  # a VAE to go on from; none: random weights
    decoder_only: bool = False  # leave the encoder, and so all latents, as they are
    latent_noise: float = 0.0  # most noise on latents, which a sampler's are not free of either
    still: float = 0.0  # weight of the distance between what rests and its picture encoded alone
    begin: float = 0.0  # share of the run before these two, which stop one that says nothing
    compile: bool = False  # norms and activations, into one kernel

    def __post_init__(self) -> None:
        total = sum(phase.steps for phase in self.phases)
        if total != self.run.steps:
            raise ValueError(f"the phases have {total} steps, the run has {self.run.steps}")
        for name in ("latent_noise", "still"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must be 0 or more")
        check_shares(self, "begin")

    def phase_at(self, step: int) -> Phase:
        """Return the phase that `step` (0-based) lies in."""
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        raise ValueError("the run has fewer steps")


class VaeLoss(nn.Module):
    """The VAE and its loss as one module, so that every launcher can wrap its forward."""

    def __init__(self, vae: WanVAE, recipe: VaeRecipe):
        super().__init__()
        self.vae = vae
        self.recipe = recipe

    def forward(
        self, clip_BFHWC: Tensor, noise_BCFHW: Tensor, added_B: Tensor, still: float
    ) -> dict[str, Tensor]:
        """Return `loss` and its parts.

        `noise` is standard normal, in the latents' shape; `added` is the deviation of what comes on
        top of the encoder's own (noise-augmented decoding, arXiv 2510.11690), as a share of each
        channel's deviation in this batch: larger latents are no way out. `still` is the weight of
        restlessness.
        """
        recipe = self.recipe
        mean, logvar = posterior(self.vae, clip_BFHWC, latent_frames_per_step=WHOLE_CLIP)
        spread = mean.var((0, 2, 3, 4), keepdim=True)
        variance = logvar.exp() + added_B.square().view(-1, 1, 1, 1, 1) * spread
        latents = mean + variance.sqrt() * noise_BCFHW
        decoded = decode_video(self.vae, latents, latent_frames_per_step=WHOLE_CLIP, clamp=False)
        weight = attention_weight(clip_BFHWC, recipe)
        error = decoded - clip_BFHWC
        pixels = (weight * (error.abs() + error.square())).mean() / weight.mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = pixels + recipe.edges * edge_error(error) + recipe.kl * kl
        if recipe.weighted_edges:
            loss = loss + recipe.weighted_edges * edge_error(error, weight / weight.mean())
        restless = mean.new_tensor(math.nan)  # not looked at
        if still:
            restless = restlessness(self.vae, clip_BFHWC, mean)
            loss = loss + still * restless
        squared = error.detach().clamp(-1, 1).square().mean()
        return {
            "loss": loss,
            "kl": kl.detach(),
            "restless": restless.detach(),
            "psnr_db": -10 * squared.log10(),
        }


def restlessness(vae: WanVAE, clip_BFHWC: Tensor, latents_BCFHW: Tensor) -> Tensor:
    """Return how far cells in which nothing moves are from those of the last picture alone.

    A causal VAE is free to code what rests by when it came to rest, and to leave its colour to the
    decoder's memory; a transformer then has nothing to copy. Mean square, over the latents'
    variance; the picture's own code is the fixed target.
    """
    last = clip_BFHWC[:, TEMPORAL::TEMPORAL]
    with torch.no_grad():
        alone = encode_image(vae, last.flatten(0, 1))[:, :, 0].unflatten(0, last.shape[:2])
        moves = (clip_BFHWC.diff(dim=1).abs().amax(-1) > 0.05).float()  # [B, F - 1, H, W]
        moves = moves.unflatten(1, (-1, TEMPORAL)).amax(2)
        # a cell sees its neighbours
        rests = 1 - F.max_pool2d(moves, 3 * SPATIAL, SPATIAL, SPATIAL)
    apart = (latents_BCFHW[:, :, 1:] - alone.transpose(1, 2)).square().mean(1)
    variance = latents_BCFHW.detach().var((0, 2, 3, 4)).mean()
    return (rests * apart).sum() / rests.sum().clamp(min=1) / variance


def edge_error(error_BFHWC: Tensor, weight_BFHW1: Tensor | None = None) -> Tensor:
    """Return how wrong the differences to the next pixel are, down and across: a mean each."""
    down, across = error_BFHWC.diff(dim=2).abs(), error_BFHWC.diff(dim=3).abs()
    if weight_BFHW1 is not None:
        down, across = weight_BFHW1[:, :, 1:] * down, weight_BFHW1[:, :, :, 1:] * across
    return down.mean() + across.mean()


def attention_weight(clip_BFHWC: Tensor, recipe: VaeRecipe) -> Tensor:
    """Return weights BFHW1, at least 1: more where pixels are unlike the ground or move."""
    ground = clip_BFHWC.flatten(1, 3).median(1).values[:, None, None, None]
    unlike = ((clip_BFHWC - ground).abs().sum(-1, keepdim=True) > 0.25).float()
    changes = (clip_BFHWC.diff(dim=1).abs().sum(-1, keepdim=True) > 0.15).float()
    weight = 1 + recipe.foreground * unlike + recipe.moving * _on_both_sides(changes)
    if recipe.vivid:
        colour = is_vivid(clip_BFHWC).unsqueeze(-1)
        moves = _on_both_sides(changes * (colour[:, 1:] | colour[:, :-1]))
        around = F.max_pool2d(moves.squeeze(-1), 3, 1, 1).unsqueeze(-1)
        weight = weight + recipe.vivid * around
    return weight


def _on_both_sides(changes: Tensor) -> Tensor:
    """Return what holds between frames [B, F - 1, ...] for the frames before and after, [B, F]."""
    still = torch.zeros_like(changes[:, :1])
    return torch.maximum(torch.cat([still, changes], 1), torch.cat([changes, still], 1))


class VaeStage:
    """What the training loop asks of a stage."""

    def __init__(self, recipe: VaeRecipe):
        self.recipe = recipe
        vae = _trainable(load_vae(recipe.start)) if recipe.start else initial_vae(recipe)
        if recipe.decoder_only:
            vae.encoder.requires_grad_(False)
            vae.conv1.requires_grad_(False)
        if recipe.compile:
            compile_norms(vae)
        self.module = VaeLoss(vae, recipe)
        data = recipe.data
        self._clips = Clips(torch.stack([data.clip(i).frames_FHWC for i in range(data.videos)]))
        # seeds below every training set
        self._held_out = torch.stack([data.clip_of(seed).frames_FHWC for seed in range(HELD_OUT)])

    def matrices(self) -> list[nn.Parameter]:
        """Return the convolutions and gains; biases are left to AdamW."""
        return [p for p in self.module.parameters() if p.ndim >= 2]

    def batch(self, step: int, process: int) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return what `VaeLoss` takes at a step in a process."""
        seed = random_for(self.recipe.run.seed, step, process).getrandbits(63)
        rng = torch.Generator().manual_seed(seed)
        phase = self.recipe.phase_at(step)
        clip = self._clips.cut(
            rng, phase.batch, phase.frames, phase.side, self.recipe.on_motion,
            vivid=self.recipe.vivid > 0,
        )  # fmt: skip
        cells = phase.side // SPATIAL
        shape = (phase.batch, LATENT_CHANNELS, latent_frames_of(phase.frames), cells, cells)
        noise = torch.randn(shape, generator=rng)
        begun = step >= self.recipe.begin * self.recipe.run.steps
        added = torch.rand(phase.batch, generator=rng) * self.recipe.latent_noise * begun
        return clip, noise, added, self.recipe.still * begun

    @torch.no_grad()
    def evaluate(self, module: VaeLoss) -> dict[str, float]:
        """Return PSNR on whole videos that are not trained on."""
        device = next(module.parameters()).device
        errors = []
        for pair in self._held_out.split(2):
            clips = pair.to(device).float() / 255
            decoded = decode_video(module.vae, encode_video(module.vae, clips))
            errors.append(float((decoded - clips).square().mean()))
        return {"held_out_psnr_db": -10 * math.log10(sum(errors) / len(errors))}

    def save(self, module: VaeLoss, path: Path) -> None:
        """Write the VAE as it is, in fp32."""
        save_model(path, module.vae.state_dict(), self._metadata())

    @torch.no_grad()
    def release(self, module: VaeLoss, path: Path) -> None:
        """Write the VAE in bf16, its latents scaled to the statistics that Wan 2.1 hosts assume."""
        vae = copy.deepcopy(module.vae).cpu().eval()
        if not self.recipe.decoder_only:  # then they were scaled before
            videos = self._clips.videos_NFHWC[:MEASURED].float() / 255
            means = torch.cat([encode_video(vae, pair) for pair in videos.split(2)])
            flat = means.transpose(0, 1).flatten(1)
            fold_statistics(vae, flat.mean(1), flat.std(1))
        save_model(path, vae.to(torch.bfloat16).state_dict(), self._metadata())

    def _metadata(self) -> dict[str, Any]:
        return {KIND: "vae", "license": LICENCE, "recipe": json.dumps(asdict(self.recipe))}


def initial_vae(recipe: VaeRecipe) -> WanVAE:
    """Return a VAE to train: time-blind at first, each residual branch silent.

    Kernels look at the newest frame only and learn to look back; frames therefore train it as
    images would, from the first step on.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        vae = WanVAE(recipe.dim)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, Conv3d) and module.kernel_size[0] == 3:
                module.weight[:, :, :2] = 0
                module.weight[:, :, 2] *= 3**0.5  # a third of the inputs is left
            if isinstance(module, ResidualBlock):
                last = module.residual[-1]
                assert isinstance(last, Conv3d) and last.bias is not None
                last.weight.zero_()
                last.bias.zero_()
    return _trainable(vae)


def _trainable(vae: WanVAE) -> WanVAE:
    """Return the VAE with gradients, its kernels laid out as its activations are."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return vae.train().requires_grad_(True)


@torch.no_grad()
def fold_statistics(vae: WanVAE, mean_C: Tensor, std_C: Tensor) -> None:
    """Scale the latents, in place, so that what measured `mean`, `std` in model space is 0 and 1.

    An affine map per channel goes into the last convolution of the encoder and its inverse into
    the first of the decoder: reconstructions stay what they were, and the latents then match the
    mean and deviation that every Wan 2.1 host assumes.
    """
    wan_mean, wan_std = torch.tensor(LATENT_MEAN), torch.tensor(LATENT_STD)
    channels = len(LATENT_MEAN)
    # in VAE space: new = (old - centre) * scale + wan_mean, old = model space * wan_std + wan_mean
    scale, centre = 1 / std_C, mean_C * wan_std + wan_mean
    into, out_of = vae.conv1, vae.conv2
    assert isinstance(into, Conv3d) and into.bias is not None and out_of.bias is not None
    into.weight[:channels] *= scale.view(-1, 1, 1, 1, 1)
    into.bias[:channels] = (into.bias[:channels] - centre) * scale + wan_mean
    into.bias[channels:] += 2 * scale.log()
    # old = (new - wan_mean) / scale + centre
    shift = centre - wan_mean / scale
    out_of.bias += (out_of.weight[:, :, 0, 0, 0] * shift).sum(1)
    out_of.weight /= scale.view(1, -1, 1, 1, 1)
