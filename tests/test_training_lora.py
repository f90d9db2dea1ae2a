"""LoRA: adapters alone are trained, and their files mean the same to everyone who reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sneakpeek_core.assembly import Files, load_parts
from sneakpeek_core.model.initial import random_transformer
from sneakpeek_core.model.lora import merge_lora
from sneakpeek_core.model.weights import load_transformer, save_model
from sneakpeek_core.training.causal_stage import CausalLoss, CausalStage
from sneakpeek_core.training.lora import LoraRecipe, add_lora, lora_tensors, save_lora
from tests.command_line import make_shelf
from tests.small import CONFIG
from tests.test_training_causal import RECIPE, FakeVideos

LORA = LoraRecipe(rank=3, alpha=6)


def test_adapters_alone_are_trained_and_change_nothing_at_first():
    """Ten of them in each block, one for each linear layer; the model's own weights rest."""
    tree = random_transformer(CONFIG, 0)
    add_lora(tree, LORA)
    trained = {name for name, p in tree.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert len(lora_tensors(tree)) == 3 * 10 * CONFIG.layers
    ups = [t for name, t in lora_tensors(tree).items() if name.endswith("lora_B.weight")]
    assert not any(up.any() for up in ups)


def test_a_merged_file_is_the_adapted_model(tmp_path: Path):
    """Weights plus the file's adapters give the flow of the model that was trained with them."""
    made = CausalStage(RECIPE, FakeVideos())
    base = {name: t.clone() for name, t in made.module.tree.state_dict().items()}
    add_lora(made.module.tree, LORA)
    with torch.no_grad():
        for name, parameter in made.module.tree.named_parameters():
            if "lora_" in name:
                rng = torch.Generator().manual_seed(len(name))
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
        made.module.tree.head.head.weight.fill_(0.01)
        base["head.head.weight"].fill_(0.01)
    save_lora(made.module.tree, tmp_path / "lora.safetensors", {})
    plain = CausalLoss(random_transformer(made.module.tree.config, 1), RECIPE.span)
    plain.tree.load_state_dict(base)
    batch = made.batch(0, 0)
    with torch.no_grad():
        before, adapted = plain.flow(batch), made.module.flow(batch)
        merge_lora(plain.tree, tmp_path / "lora.safetensors")
        merged = plain.flow(batch)
    assert (merged - adapted).abs().max() < 1e-4 * adapted.abs().max()
    assert (before - adapted).abs().max() > 1e-2 * adapted.abs().max()


def test_names_are_those_that_hosts_know(tmp_path: Path):
    """`diffusion_model.` in front, lora_A down, lora_B up, alpha beside them."""
    tree = random_transformer(CONFIG, 0)
    add_lora(tree, LORA)
    save_lora(tree, tmp_path / "lora.safetensors", {"trained": "in a test"})
    tensors = load_file(tmp_path / "lora.safetensors")
    stem = "diffusion_model.blocks.1.ffn.0"
    assert tensors[f"{stem}.lora_A.weight"].shape == (3, CONFIG.dim)
    assert tensors[f"{stem}.lora_B.weight"].shape == (CONFIG.ffn_dim, 3)
    assert tensors[f"{stem}.alpha"] == 6
    assert "diffusion_model.blocks.0.cross_attn.o.lora_A.weight" in tensors


def test_a_stage_trains_a_lora_of_a_given_model(tmp_path: Path):
    """From a file, adapters only; what it saves is a LoRA of that file."""
    start = tmp_path / "model.safetensors"
    config = replace(CONFIG, text_dim=RECIPE.model.text_dim, text_len=RECIPE.model.text_len)
    save_model(start, random_transformer(config, 0).state_dict(), {"sneakpeek": {"preset": "tiny"}})
    recipe = replace(RECIPE, lora=LORA, start=str(start))
    stage = CausalStage(recipe, FakeVideos(), load_transformer(start))
    stage.module(*stage.batch(0, 0))["loss"].backward()
    grads = {name for name, p in stage.module.named_parameters() if p.grad is not None}
    assert grads and all("lora_" in name for name in grads)
    assert all("lora_" in name for name, p in stage.module.named_parameters() if p.requires_grad)
    assert len(stage.matrices()) == 2 * 10 * CONFIG.layers
    stage.save(stage.module, tmp_path / "lora.safetensors")
    merge_lora(load_transformer(start).tree, tmp_path / "lora.safetensors")


def test_a_lora_is_another_model(tmp_path: Path):
    """The command line's parts with a LoRA: a fingerprint of their own, so caches do not mix."""
    shelf = make_shelf(tmp_path)
    tree = load_transformer(shelf.model).tree
    add_lora(tree, LORA)
    with torch.no_grad():
        for name, parameter in tree.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.1)
    path = tmp_path / "lora.safetensors"
    save_lora(tree, path, {})
    prints = [
        load_parts(
            Files.of(shelf.model, shelf.vae, lora=lora), device=torch.device("cpu")
        ).model.fingerprint
        for lora in (None, path, path)
    ]
    assert prints[0] != prints[1] == prints[2]
    with pytest.raises(ValueError, match=r"lora .* does not exist"):
        Files.of(shelf.model, shelf.vae, lora=tmp_path / "none.safetensors")


def test_files_that_do_not_fit_are_refused(tmp_path: Path):
    """Another model's adapters, half a pair, a file that is no LoRA."""
    tree, path = random_transformer(CONFIG, 0), tmp_path / "lora.safetensors"
    down, up = torch.zeros(2, CONFIG.dim), torch.zeros(CONFIG.dim, 2)
    stem = "diffusion_model.blocks.0.self_attn.q"
    cases = {
        "no adapter": {f"{stem}.lora_A.weight": down},
        "does not fit": {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up[:5]},
        "is no adapter of this model": {
            "diffusion_model.blocks.99.self_attn.q.lora_A.weight": down,
            "diffusion_model.blocks.99.self_attn.q.lora_B.weight": up,
        },
        "not part of a LoRA": {"blocks.0.self_attn.q.weight": down},
    }
    for named, tensors in cases.items():
        save_file(tensors, path)
        with pytest.raises(ValueError, match=named):
            merge_lora(tree, path)


def test_impossible_ranks_are_refused():
    """Rank and alpha are above 0."""
    with pytest.raises(ValueError, match="rank 0"):
        LoraRecipe(rank=0)
