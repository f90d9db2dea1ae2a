"""The loop with the future region off reproduces the reference Self-Forcing implementation.

The folder `SNEAKPEEK_GOLDEN` (default: the copy in tests/data) holds `weights.safetensors` and one
file per case; see the `config` in each file's metadata.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sneakpeek_core.cache import CacheSpec, KVCache
from sneakpeek_core.conditioning import Conditioning
from sneakpeek_core.denoiser import Denoiser
from sneakpeek_core.model.config import HEAD_DIM
from sneakpeek_core.model.weights import load_transformer
from sneakpeek_core.policy import CachePolicy
from sneakpeek_core.sampler import Rollout
from sneakpeek_core.schedule import Schedule, Step, Timeline
from sneakpeek_core.settings import SamplerSettings
from sneakpeek_core.shapes import PATCH
from sneakpeek_core.start import start_chunks

FOLDER = Path(os.environ.get("SNEAKPEEK_GOLDEN") or Path(__file__).parent / "data/self_forcing")
WEIGHTS = FOLDER / "weights.safetensors"
CASES = sorted(path for path in FOLDER.glob("*.safetensors") if path != WEIGHTS)
TOLERANCE = 1e-4


def test_golden_folder_holds_cases():
    """A wrong folder must not pass by testing nothing."""
    assert WEIGHTS.is_file(), f"no weights.safetensors in {FOLDER}"
    assert CASES, f"no cases in {FOLDER}"


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
@torch.no_grad()
def test_golden_case(path: Path):
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    tensors = load_file(path)
    expected = tensors["latents"].transpose(1, 2)
    rollout, conditioning = rollout_of(config, tensors)

    parts = []
    if "initial_latent" in tensors:
        for start in given_chunks(config, tensors):
            rollout.commit(start, conditioning)
            parts.append(start)
    while rollout.frontier < expected.shape[2]:
        latents = rollout.make(conditioning)
        rollout.commit(latents, conditioning)
        parts.append(latents)

    made = torch.cat(parts, dim=2)
    assert made.shape == expected.shape
    assert (made - expected).abs().max().item() < TOLERANCE


def rollout_of(config: dict, tensors: dict) -> tuple[Rollout, Conditioning]:
    height, width = tensors["noise"].shape[-2:]
    frames = tensors["latents"].shape[1]
    sink, local = config["sink"], config["local"]
    settings = SamplerSettings(
        sigmas=(*(t / 1000 for t in tensors["timesteps"].tolist()), 0.0),
        chunk=config["chunk"],
        policy=CachePolicy(sink=sink, window=None if local < 0 else local - sink),
    )
    tree = load_transformer(WEIGHTS).tree
    cache = KVCache(
        CacheSpec(
            layers=len(tree.blocks),
            heads=config["dim"] // HEAD_DIM,
            head_dim=HEAD_DIM,
            rows=height // PATCH,
            columns=width // PATCH,
            past=settings.policy.capacity(frames),
            future=0,
            batch=tensors["noise"].shape[0],
        )
    )
    denoiser = Denoiser(tree, text_len=config["text_len"])
    schedule = Schedule((Step(text="golden", seconds=1.0),))
    conditioning = Conditioning(
        schedule=schedule,
        timeline=Timeline((frames,)),
        texts=(tensors["context"],),
        goals=(None,),
    )
    noise = recorded_noise(config, tensors, given=len(given_chunks(config, tensors)))
    return Rollout(denoiser, [cache], settings, (height, width), noise=noise), conditioning


def given_chunks(config: dict, tensors: dict) -> list[torch.Tensor]:
    """Return the given latents in the pieces that the reference ran a context pass over."""
    if "initial_latent" not in tensors:
        return []
    return start_chunks(tensors["initial_latent"].transpose(1, 2), config["chunk"])


def recorded_noise(config: dict, tensors: dict, given: int):
    """Hand out the reference's own noise in the order it was drawn, behind `given` chunks."""
    passes, chunk = len(tensors["timesteps"]), config["chunk"]

    def draw(kind, index, step, shape):
        assert kind == "chunk"
        number = index - given
        if step == 0:
            drawn = tensors["noise"][:, number * chunk : (number + 1) * chunk]
        else:
            drawn = tensors["renoise"][number * (passes - 1) + step - 1].unsqueeze(0)
        return drawn.transpose(1, 2)

    return draw
