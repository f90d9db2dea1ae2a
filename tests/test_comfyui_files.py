"""The embedded files, and LoRAs trained here, load in ComfyUI by its own loaders as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sneakpeek_core.assembly import EMBEDDED
from sneakpeek_core.model.weights import load_transformer
from sneakpeek_core.training.lora import LoraRecipe, add_lora, save_lora
from tests.comfyui import CHECKOUTS, run_inside
from tests.small import needs_tiny

pytestmark = needs_tiny
MODEL, VAE = EMBEDDED / "tiny_model.safetensors", EMBEDDED / "tiny_vae.safetensors"
LOAD_MODEL = """
    from sneakpeek_core.model.forward import Host, TextRun, text_layers, velocity
    from sneakpeek_core.model.rope import rope_for, rotate
    from sneakpeek_core.model.weights import load_transformer

    ours = load_transformer({model!r}).tree
    patcher = comfy.sd.load_diffusion_model({model!r}, {{"dtype": torch.float32}})
    host = patcher.model.diffusion_model
    assert (host.dim, host.num_heads, len(host.blocks)) == (256, 2, len(ours.blocks))
    assert type(patcher.model.latent_format).__name__ == "Wan21"
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 3, 8, 8, generator=rng)
    text = torch.randn(1, 512, 4096, generator=rng)
    time = torch.full((1, 3), 700.0)

    def run(tree):
        return velocity(
            tree, x, time, rope_for(range(3), 4, 4, head_dim=128),
            [TextRun(0, 3, text_layers(tree, text))],
            lambda layer, k, v, rope: (rotate(k, rope), v, None),
            dtype=torch.float32, host=Host(),
        )

    def same(a, b, tolerance):
        gap = (a.float() - b.float()).abs().max().item() / b.abs().max().item()
        assert gap < tolerance, gap
"""
MODEL_SCRIPT = """
    with torch.no_grad():
        same(run(host), run(ours), 1e-5)
        same(host(x, time[:, 0], text), run(ours), 1e-4)
"""
LORA_SCRIPT = """
    import comfy.utils
    from sneakpeek_core.model.lora import merge_lora

    lora = comfy.utils.load_torch_file({lora!r})
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)
    with torch.no_grad():
        before = run(ours)
        merge_lora(ours, {lora!r})
        patched.patch_model(device_to=torch.device("cpu"))
        same(run(patched.model.diffusion_model), run(ours), 1e-4)
        assert (run(ours) - before).abs().max() > 1e-2 * before.abs().max()
"""
VAE_SCRIPT = """
    import comfy.utils
    from sneakpeek_core.model.weights import load_vae
    from sneakpeek_core.vae.streaming import decode_video, encode_video
    from sneakpeek_core.vae.wan import to_model_space, to_vae_space

    ours = load_vae({vae!r})
    host = comfy.sd.VAE(sd=comfy.utils.load_torch_file({vae!r}), dtype=torch.float32)
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 4, 8, 8, generator=rng)
    with torch.no_grad():
        frames = decode_video(ours, latents)
        theirs = host.decode(to_vae_space(latents))
        assert theirs.shape[-4:] == frames.shape[-4:], theirs.shape
        assert (theirs.reshape(frames.shape) - frames).abs().max() < 1e-3
        back = host.encode(frames[0])
        assert (to_model_space(back) - encode_video(ours, frames)).abs().max() < 1e-2
"""


@pytest.mark.parametrize("version", CHECKOUTS)
def test_load_diffusion_model_takes_the_tiny_transformer(version: str):
    """What Load Diffusion Model makes of the file computes what ours does."""
    script = LOAD_MODEL.format(model=str(MODEL)) + MODEL_SCRIPT
    run_inside(CHECKOUTS[version], script)


@pytest.mark.parametrize("version", CHECKOUTS)
def test_load_vae_takes_the_tiny_vae(version: str):
    """What Load VAE makes of the file decodes and encodes as ours does."""
    run_inside(CHECKOUTS[version], VAE_SCRIPT.format(vae=str(VAE)))


@pytest.mark.parametrize("version", CHECKOUTS)
def test_the_stock_lora_loader_applies_our_loras(version: str, tmp_path: Path):
    """Load LoRA on the tiny transformer is our own merge."""
    tree = load_transformer(MODEL).tree
    add_lora(tree, LoraRecipe(rank=4, alpha=8))
    with torch.no_grad():
        for name, parameter in tree.named_parameters():
            if "lora_" in name:
                rng = torch.Generator().manual_seed(len(name))
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    save_lora(tree, tmp_path / "lora.safetensors", {})
    script = LOAD_MODEL.format(model=str(MODEL)) + LORA_SCRIPT.format(
        lora=str(tmp_path / "lora.safetensors")
    )
    run_inside(CHECKOUTS[version], script)
