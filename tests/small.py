"""Small random models for tests: real structure, real names, tiny sizes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from sneakpeek_core.assembly import TINY
from sneakpeek_core.conditioning import Conditioner
from sneakpeek_core.denoiser import Denoiser
from sneakpeek_core.guidance import FutureGuidance
from sneakpeek_core.model.config import ModelConfig
from sneakpeek_core.model.fingerprint import weights_fingerprint
from sneakpeek_core.model.initial import random_transformer
from sneakpeek_core.policy import CachePolicy
from sneakpeek_core.schedule import Schedule, parse_steps
from sneakpeek_core.settings import SamplerSettings
from sneakpeek_core.stream import Model, VideoStream

needs_tiny = pytest.mark.skipif(
    not all(path.exists() for path in TINY), reason="THE TINY MODEL'S WEIGHTS ARE NOT HERE"
)
TEXT_DIM = 32
SIZE = 32  # pixels: a latent of 4x4, 4 tokens a latent frame
CELLS = SIZE // 8  # latent cells each way
CONFIG = ModelConfig(dim=128, ffn_dim=256, layers=2, text_dim=TEXT_DIM, text_len=8)
SIGMAS = (1.0, 0.8, 0.0)
GUIDANCE = FutureGuidance()
JOINT = replace(GUIDANCE, mode="joint")
RELATIVE = CachePolicy(sink=1, window=6, positions="relative")
THREE = ("[1s] lift it", "[1s] turn it", "[1s] put it down")  # 5, 9 and 13 latent frames


def steps(*seconds_and_texts: str) -> Schedule:
    return parse_steps("\n".join(seconds_and_texts or ("[1.5s] lift it", "[1.5s] put it down")))


def encode(texts: list[str]) -> list[Tensor]:
    """A stand-in text encoder: different words, different embeddings."""
    made = []
    for text in texts:
        words = text.split()
        rng = torch.Generator().manual_seed(sum(map(ord, text)))
        made.append(torch.randn(len(words), TEXT_DIM, generator=rng))
    return made


def small_model(seed: int = 0, config: ModelConfig = CONFIG, **options) -> Model:
    tree = random_transformer(config, seed).eval().requires_grad_(False)
    denoiser = Denoiser(tree, text_len=config.text_len, **options)
    return Model(denoiser=denoiser, fingerprint=weights_fingerprint(tree.state_dict()))


@cache
def model() -> Model:
    """The small model, made once."""
    return small_model()


def settings(**changes) -> SamplerSettings:
    base = SamplerSettings(sigmas=SIGMAS, chunk=2, policy=RELATIVE, guidance=GUIDANCE)
    return replace(base, **changes)


def conditioner(**changes) -> Conditioner:
    return Conditioner(**({"fps": 16.0, "encode": encode, "negative": negative()} | changes))


def negative() -> Tensor:
    return encode(["blurry bad"])[0][None]


def start(frames: int = 1, batch: int = 1, size: int = SIZE) -> Tensor:
    rng = torch.Generator().manual_seed(9)
    return torch.randn(batch, 16, frames, size // 8, size // 8, generator=rng)


def goal(seed: int) -> Tensor:
    return torch.randn(1, 16, 1, CELLS, CELLS, generator=torch.Generator().manual_seed(seed))


def stream(
    schedule: Schedule | None = None,
    options: SamplerSettings | None = None,
    *,
    model: Model | None = None,
    image: bool = True,
    size: int = SIZE,
    **more,
) -> VideoStream:
    options = options or settings()
    first = start(batch=len(options.seeds), size=size) if image else None
    return VideoStream(
        model or small_model(), conditioner(), schedule or steps(), options,
        width=size, height=size, start=first, **more,
    )  # fmt: skip


def latents_of(source: VideoStream) -> Tensor:
    return torch.cat([chunk.latents_BCFHW for chunk in source], dim=2)
