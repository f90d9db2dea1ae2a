"""`sneakpeek estimate`: what a video will need, before anything is loaded."""

from __future__ import annotations

import argparse

import psutil
import torch

from ..assembly import BIG, RANDOM_CONFIG, RANDOM_VAE_DIM, Files
from ..estimate import Plan, estimate
from ..model.config import ModelConfig
from ..model.inspect import describe
from ..model.presets import PRESETS, Preset
from ..model.transformer import WanTransformer
from ..schedule import Timeline
from .options import (
    BIG_DIM,
    DTYPES,
    FULL_SIZE,
    SMALL_SIZE,
    device_of,
    goals_of,
    settings_of,
    size_of,
)
from .steps import schedule_of


def run(options: argparse.Namespace) -> int:
    """Print the estimate; say what to change when it does not fit."""
    device = device_of(options.device)
    files = Files(model=options.model, vae=options.vae, text_encoder=options.text_encoder)
    config, preset, parameters, vae_dim = _sizes(files)
    settings = settings_of(options, preset, goals=bool(goals_of(options.goal)))
    big = parameters > BIG
    dtype = DTYPES.get(options.dtype, torch.bfloat16 if big else torch.float32)
    width, height = size_of(options.size, FULL_SIZE if config.dim >= BIG_DIM else SMALL_SIZE)
    timeline = Timeline.of(schedule_of(options), options.fps or preset.fps)
    settings.check_length(timeline.latent_frames)
    plan = Plan(
        config=config,
        parameters=parameters,
        vae_dim=vae_dim,
        width=width,
        height=height,
        latent_frames=timeline.latent_frames,
        settings=settings,
        dtype=dtype,
        vae_dtype=torch.float32 if dtype == torch.float32 else torch.bfloat16,
    )
    print(f"{width}x{height}, {timeline.frames} frames, {preset.name}, {dtype} on {device}")
    print(estimate(plan, _free(device)))
    return 0


def _sizes(files: Files) -> tuple[ModelConfig, Preset, int, int]:
    if files.model is None or files.vae is None:
        with torch.device("meta"):
            tree = WanTransformer(RANDOM_CONFIG)
        count = sum(parameter.numel() for parameter in tree.parameters())
        return RANDOM_CONFIG, PRESETS["tiny"], count, RANDOM_VAE_DIM
    model, vae = describe(files.model), describe(files.vae)
    if model.config is None or model.preset is None or not model.streamable:
        raise ValueError(f"{files.model}: {model.problem}")
    if vae.vae_dim is None:
        raise ValueError(
            f"{files.vae} is not a VAE but {vae.label or vae.kind}; give a Wan 2.1 VAE"
        )
    return model.config, model.preset, model.parameters, vae.vae_dim


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
