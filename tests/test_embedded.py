"""The files that come along: small together, by committed recipes, as Wan 2.1 hosts want them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sneakpeek_core.assembly import EMBEDDED
from sneakpeek_core.model.weights import load_vae
from sneakpeek_core.text_encoder import random_text_encoder
from sneakpeek_core.toyworld.render import render
from sneakpeek_core.toyworld.scene import make_scene
from sneakpeek_core.training.causal_stage import CausalRecipe
from sneakpeek_core.training.recipe import build
from sneakpeek_core.training.sources import data_of
from sneakpeek_core.training.stages import RECIPES, read_recipe
from sneakpeek_core.training.vae_stage import VaeRecipe
from sneakpeek_core.vae.streaming import encode_video

MOST_BYTES = 30_000_000
NAMES = {"tiny_model", "tiny_text_encoder", "tiny_vae"}


def test_weights_are_small_enough_for_a_repository():
    """All of them together."""
    files = list(EMBEDDED.glob("*.safetensors"))
    assert {path.stem for path in files} == NAMES
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES


def test_the_text_encoder_is_what_the_model_card_says():
    """Random weights of seed 0 in bf16, never trained."""
    found = load_file(EMBEDDED / "tiny_text_encoder.safetensors")
    expected = random_text_encoder(0).to(torch.bfloat16).state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def without_none(table: dict[str, Any]) -> dict[str, Any]:
    """Return a table as TOML has it, where what is not set is not there."""
    parts = {k: without_none(v) if isinstance(v, dict) else v for k, v in table.items()}
    return {key: value for key, value in parts.items() if value is not None}


def stated(stage: str, table: dict[str, Any]) -> dict[str, Any]:
    """Return everything that a recipe states, with the defaults of what it leaves out."""
    table = without_none(table)
    if stage == "vae":
        return asdict(build(VaeRecipe, table))
    data = {"data": asdict(data_of(table.pop("data")))}
    return asdict(build(CausalRecipe, table)) | data


def test_the_recipes_that_made_the_weights_come_along():
    """Key by key, as the files themselves say; what was added since then has its default."""
    tables = [read_recipe(path) for path in RECIPES.glob("*.toml")]
    committed = [stated(table.pop("stage"), table) for table in tables]
    for name, stage in (("tiny_vae", "vae"), ("tiny_model", "causal")):
        with safe_open(EMBEDDED / f"{name}.safetensors", "pt") as file:
            assert stated(stage, json.loads(file.metadata()["recipe"])) in committed


def test_latents_have_the_statistics_that_wan_hosts_assume():
    """Scaled by Wan 2.1's fixed mean and deviation, every channel is about standard."""
    vae = load_vae(EMBEDDED / "tiny_vae.safetensors")
    videos = torch.stack([render(make_scene(seed, 2)) for seed in range(6)])
    with torch.no_grad():
        flat = encode_video(vae, videos).transpose(0, 1).flatten(1)
    assert flat.mean(1).abs().max() < 0.2
    assert (flat.std(1) - 1).abs().max() < 0.2
