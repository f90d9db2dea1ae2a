"""Recipes to runs: the table of stages, and what each needs before its first step."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from ..assembly import EMBEDDED
from ..model.fingerprint import weights_fingerprint
from ..model.weights import load_transformer, load_vae
from ..text_encoder import load_text_encoder
from ..vae.wan import WanVAE
from .causal_stage import CausalRecipe, CausalStage, check_held_out, sizes_of
from .latent_set import LatentSet, encode_clips
from .loop import Trainer, cpu_only
from .recipe import build, merged, read_toml, record
from .sources import data_of, source_of
from .vae_stage import VaeRecipe, VaeStage

log = logging.getLogger(__name__)
RECIPES = Path(__file__).parent / "recipes"
FOLLOWED = "recipes.jsonl"  # in a run's folder: which recipe it followed, from which step on


def trainer_for(recipe: Path, folder: Path, cache: Path | None = None) -> Trainer:
    """Return what a recipe trains, in `folder`; latents are encoded into `cache` first.

    `ValueError` names what is wrong with the recipe, its data or its files.
    """
    table = read_recipe(recipe)
    stage = table.get("stage")
    if stage not in STAGES:
        raise ValueError(f"{recipe}: stage {stage!r} must be one of {', '.join(STAGES)}")
    rest = {key: value for key, value in table.items() if key != "stage"}
    trainer = STAGES[stage](rest, folder, cache or folder / "latents")
    if trainer.accelerator.is_main_process:
        step = trainer.progress.step
        changed = record(folder / FOLLOWED, step, table)
        if changed:
            log.warning("from step %d on the recipe is another: %s", step, ", ".join(changed))
    return trainer


def recipe_path(name: str) -> Path:
    """Return a recipe by its path, or one that comes with the package by its name."""
    path, own = Path(name), RECIPES / f"{name}.toml"
    if path.is_file():
        return path
    if own.is_file():
        return own
    names = ", ".join(sorted(known.stem for known in RECIPES.glob("*.toml")))
    raise ValueError(f"recipe {name} is no file and none of {names}")


def read_recipe(path: Path, through: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a recipe's table, merged into that of the recipe which it `extends`, if any.

    `ValueError` for recipes that extend each other in a circle (`through` are those on the way).
    """
    table = read_toml(path)
    extended = table.pop("extends", None)
    if extended is None:
        return table
    base, through = recipe_path(str(extended)).resolve(), (*through, path.resolve())
    if base in through:
        raise ValueError(f"{path} extends {base}, which extends it; take one of them out")
    return merged(read_recipe(base, through), table)


def _vae(table: dict[str, Any], folder: Path, cache: Path) -> Trainer:
    recipe = build(VaeRecipe, table)
    return Trainer(VaeStage(recipe), recipe.run, recipe.optimiser, folder)


def _causal(table: dict[str, Any], folder: Path, cache: Path) -> Trainer:
    data = data_of(table.pop("data", {}))
    recipe = build(CausalRecipe, table)
    start = load_transformer(recipe.start) if recipe.start else None
    if start is not None and "model" in table and sizes_of(start.tree) != recipe.model:
        raise ValueError(f"model: the sizes of {recipe.start} are others; leave the table out")
    videos = LatentSet(cache, _encode(recipe, data, cache))
    described = {"data": dataclasses.asdict(data)}
    stage = CausalStage(recipe, videos, start, described, data.fps)
    return Trainer(stage, recipe.run, recipe.optimiser, folder)


def _encode(recipe: CausalRecipe, data: Any, cache: Path) -> Sequence[str]:
    """Encode what the cache lacks, in one process while others wait; return the clips' names."""
    source = source_of(data)
    check_held_out(recipe, len(source.names))
    # the others wait for as long as encoding takes
    state = PartialState(cpu=cpu_only(), timeout=timedelta(days=7))
    with state.main_process_first():
        if not state.is_main_process:
            return source.names
        device = state.device or torch.device("cpu")
        dtype = torch.bfloat16 if recipe.run.precision == "bf16" else torch.float32
        vae = load_vae(recipe.vae or EMBEDDED / "tiny_vae.safetensors", dtype, device)
        encoder = load_text_encoder(
            recipe.text_encoder or EMBEDDED / "tiny_text_encoder.safetensors"
        )
        about = {
            "data": dataclasses.asdict(data) | {"videos": None},
            "vae": weights_fingerprint(_encoding(vae)),
        }

        def texts(sentences: list[str]) -> list[Tensor]:
            with torch.no_grad():
                return encoder(sentences)

        encode_clips(
            source.names, source.clip_at, vae, texts, cache, about=about,
            progress=lambda groups: tqdm(list(groups), desc="encoding", mininterval=1.0),
        )  # fmt: skip
    return source.names


def _encoding(vae: WanVAE) -> dict[str, Tensor]:
    """Return the weights that latents depend on: another decoder makes no others."""
    return {
        name: tensor
        for name, tensor in vae.state_dict().items()
        if name.startswith(("encoder.", "conv1."))
    }


STAGES: dict[str, Callable[[dict[str, Any], Path, Path], Trainer]] = {
    "vae": _vae,
    "causal": _causal,
}
