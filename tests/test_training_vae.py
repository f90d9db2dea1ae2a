"""Stage 0: a VAE that starts as an image autoencoder, learns, and ends with Wan's statistics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sneakpeek_core.model.initial import random_vae
from sneakpeek_core.model.weights import load_vae
from sneakpeek_core.training.recipe import Optimiser, Run
from sneakpeek_core.training.sources import ToyData
from sneakpeek_core.training.vae_stage import (
    Phase,
    VaeRecipe,
    VaeStage,
    attention_weight,
    edge_error,
    fold_statistics,
    initial_vae,
    restlessness,
)
from sneakpeek_core.vae.streaming import decode_video, encode_image, encode_video, posterior

RECIPE = VaeRecipe(
    run=Run(steps=3, seed=2),
    optimiser=Optimiser(),
    phases=(Phase(steps=2, frames=5, batch=2, side=16), Phase(steps=1, frames=9, batch=1, side=32)),
    dim=8,
    data=ToyData(videos=2, steps=1),
)


@pytest.fixture(scope="module")
def stage() -> VaeStage:
    return VaeStage(RECIPE)


def test_phases_follow_each_other(stage: VaeStage):
    """Every step has its phase's size; the phases must fill the run."""
    shapes = [tuple(stage.batch(step, 0)[0].shape) for step in range(3)]
    assert shapes == [(2, 5, 16, 16, 3), (2, 5, 16, 16, 3), (1, 9, 32, 32, 3)]
    with pytest.raises(ValueError, match="3 steps, the run has 4"):
        replace(RECIPE, run=Run(steps=4))


def test_a_batch_is_a_function_of_step_and_process(stage: VaeStage):
    """Again the same, elsewhere another one."""
    (*first, weight), (*again, same) = stage.batch(1, 0), stage.batch(1, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and weight == same
    assert not torch.equal(first[0], stage.batch(0, 0)[0])
    assert not torch.equal(first[1], stage.batch(1, 1)[1])


def test_the_first_model_sees_each_frame_alone():
    """Before training nothing looks back: a frame's features do not depend on earlier ones."""
    vae = initial_vae(RECIPE).eval()
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 3, 2, 2, generator=rng)
    other = latents.clone()
    other[:, :, 0] = torch.randn(1, 16, 2, 2, generator=rng)
    with torch.no_grad():
        a, b = decode_video(vae, latents), decode_video(vae, other)
    assert torch.equal(a[:, 5:], b[:, 5:]) and not torch.equal(a[:, :1], b[:, :1])


def test_the_loss_falls():
    """A dozen steps on one clip."""
    stage = VaeStage(RECIPE)
    optimiser = torch.optim.AdamW(stage.module.parameters(), 3e-3)
    batch = stage.batch(0, 0)
    losses = []
    for _ in range(12):
        parts = stage.module(*batch)
        optimiser.zero_grad()
        parts["loss"].backward()
        optimiser.step()
        losses.append(float(parts["loss"].detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert stage.evaluate(stage.module)["held_out_psnr_db"] > 5


def test_only_the_decoder_trains_when_asked(tmp_path: Path):
    """Latents stay what they are: the encoder has no gradient, the decoder has."""
    stage = VaeStage(RECIPE)
    stage.save(stage.module, tmp_path / "vae.safetensors")
    recipe = replace(RECIPE, start=str(tmp_path / "vae.safetensors"), decoder_only=True)
    later = VaeStage(recipe)
    later.module(*later.batch(0, 0))["loss"].backward()
    grads = {name for name, p in later.module.named_parameters() if p.grad is not None}
    assert grads and all(name.startswith(("vae.decoder", "vae.conv2")) for name in grads)
    assert load_vae(tmp_path / "vae.safetensors").dim == 8


def test_latents_are_noisier_when_asked(monkeypatch: pytest.MonkeyPatch):
    """The decoder is shown the encoder's own noise and what is added: a share of each channel's
    deviation, by as much as was drawn."""
    assert not VaeStage(RECIPE).batch(0, 0)[2].any()
    with pytest.raises(ValueError, match="latent_noise -1"):
        replace(RECIPE, latent_noise=-1)
    stage = VaeStage(replace(RECIPE, latent_noise=0.5))
    clip, noise, added, still = stage.batch(0, 0)
    assert added.shape == (2,) and ((added > 0) & (added < 0.5)).all()

    seen = []

    def decode(vae, latents_BCFHW, **options):
        seen.append(latents_BCFHW)
        return decode_video(vae, latents_BCFHW, **options)

    monkeypatch.setattr("sneakpeek_core.training.vae_stage.decode_video", decode)
    levels = torch.tensor([0.0, 3.0])
    stage.module(clip, torch.ones_like(noise), levels, still)
    mean, logvar = posterior(stage.module.vae, clip)
    flat = mean.transpose(0, 1).flatten(1)
    added = torch.tensor([0.0, 3.0]).view(-1, 1, 1, 1, 1) * flat.std(1).view(1, -1, 1, 1, 1)
    want = mean + torch.sqrt(logvar.exp() + added.square())
    torch.testing.assert_close(seen[0], want)


def test_what_rests_is_coded_as_its_picture():
    """Only cells count in which, and beside which, nothing moves in a latent frame's time.

    48x48 pixels are 6x6 cells. Something moves in cell (0, 0) in the second latent frame's time, so
    that it and its three neighbours may be anything then.
    """
    vae = random_vae(8, seed=3)
    clip = torch.rand(1, 1, 48, 48, 3, generator=torch.Generator().manual_seed(1)).repeat(
        1, 9, 1, 1, 1
    )
    clip[:, 7:, 2:4, 2:4] = 1.0 - clip[:, 7:, 2:4, 2:4].round()
    with torch.no_grad():
        alone = torch.cat([encode_image(vae, clip[:, at]) for at in (0, 4, 8)], 2)
        assert restlessness(vae, clip, alone) < 1e-8
        moving = alone.clone()
        moving[:, :, 2, :2, :2] += 100.0
        assert restlessness(vae, clip, moving) < 1e-8
        first = alone.clone()
        first[:, :, 0] += 1.0  # is not compared: it is a picture alone
        assert restlessness(vae, clip, first) < 1e-8
        wrong = alone.clone()
        wrong[:, :, 1, 5, 5] += 2.0
        found = restlessness(vae, clip, wrong) * wrong.var((0, 2, 3, 4)).mean()
    resting = 36 + 32
    assert float(found) == pytest.approx(4.0 / resting, rel=1e-3)


def test_restlessness_is_in_the_loss_when_asked():
    """The loss grows by its weight."""
    plain, other = VaeStage(RECIPE), VaeStage(replace(RECIPE, still=2.0))
    vae = random_vae(RECIPE.dim, seed=3).state_dict()
    for one in (plain, other):
        one.module.vae.load_state_dict(vae)
    with torch.no_grad():
        without, asked = plain.module(*plain.batch(0, 0)), other.module(*other.batch(0, 0))
    assert asked["restless"] > 0.01 and without["restless"].isnan()
    torch.testing.assert_close(asked["loss"], without["loss"] + 2.0 * asked["restless"])
    with pytest.raises(ValueError, match="still -1"):
        replace(RECIPE, still=-1)


def test_robustness_begins_when_the_recipe_says():
    """Noise on latents, and the weight of restlessness, are for an encoder that says something."""
    stage = VaeStage(replace(RECIPE, latent_noise=0.5, still=2.0, begin=0.5))
    _, _, none, at_first = stage.batch(1, 0)
    _, _, noise, later = stage.batch(2, 0)
    assert not none.any() and noise.all() and (at_first, later) == (0.0, 2.0)
    with pytest.raises(ValueError, match=r"begin 1\.5 must be from 0 to 1"):
        replace(RECIPE, begin=1.5)


def test_what_differs_and_what_moves_weighs_more():
    """Ground 1, an object more, an object that moves more still, before and after it moves."""
    clip = torch.full((1, 3, 16, 16, 3), 0.8)
    clip[:, :, 2:4, 2:4] = 0.1
    clip[:, 0, 10:12, 10:12] = 0.1
    clip[:, 1:, 10:12, 13:15] = 0.1
    weights = replace(RECIPE, foreground=4.0, moving=3.0)
    weight = attention_weight(clip, weights)[0, :, :, :, 0]
    assert weight[:, 0, 0].tolist() == [1, 1, 1]
    assert weight[:, 2, 2].tolist() == [5, 5, 5]
    assert weight[:, 10, 10].tolist() == [8, 4, 1]
    assert weight[:, 10, 13].tolist() == [4, 8, 5]


def test_a_strong_colour_that_moves_weighs_most():
    """Around it as well, since edges make a shape; grey that moves, and what rests, as ever."""
    clip = torch.full((1, 3, 16, 16, 3), 0.8)
    clip[:, 0, 2:4, 2:4] = clip[:, 1:, 2:4, 5:7] = 0.1
    clip[:, 0, 10:12, 10:12] = torch.tensor((0.1, 0.1, 0.9))
    clip[:, 1:, 10:12, 13:15] = torch.tensor((0.1, 0.1, 0.9))
    without, asked = (
        attention_weight(clip, replace(RECIPE, vivid=vivid))[0, ..., 0] for vivid in (0.0, 7.0)
    )
    more = asked - without
    assert more[:2, 9:13, 9:16].eq(7).all() and more[:, :9].eq(0).all() and more[2].eq(0).all()


def test_edges_weigh_what_their_pixels_weigh():
    """A wrong edge costs its pixels' weight; one as wrong all over has no edges."""
    error, weight = torch.zeros(1, 2, 8, 8, 3), torch.ones(1, 2, 8, 8, 1)
    error[:, 0, 4:], weight[:, 0, 4:] = 0.5, 6.0
    plain, weighted = edge_error(error), edge_error(error, weight)
    # one of 7 rows of differences, on one of two frames
    assert plain == pytest.approx(0.5 / 14) and weighted == pytest.approx(6 * plain)
    assert edge_error(torch.full((1, 2, 8, 8, 3), 0.5), weight) == 0


def test_weighted_edges_are_in_the_loss_when_asked():
    """At the recipe's weight. Where all pixels weigh the same they are plain edges, else not."""
    batch = VaeStage(RECIPE).batch(0, 0)

    def loss(edges: float, weighted: float, heavy: float) -> float:
        weights = {"edges": edges, "weighted_edges": weighted, "foreground": heavy}
        stage = VaeStage(replace(RECIPE, moving=0.0, **weights))
        return float(stage.module(*batch)["loss"].detach())

    assert loss(0.0, 2.0, heavy=0.0) == pytest.approx(loss(2.0, 0.0, heavy=0.0), rel=1e-5)
    assert loss(0.0, 2.0, heavy=0.0) > loss(0.0, 1.0, heavy=0.0) > loss(0.0, 0.0, heavy=0.0)
    assert loss(0.0, 2.0, heavy=9.0) != pytest.approx(loss(2.0, 0.0, heavy=9.0), rel=1e-3)


def test_folding_changes_the_scale_and_no_picture():
    """Latents come out with mean 0 and deviation 1; reconstructions and posteriors stay."""
    vae = random_vae(8, 3).eval().requires_grad_(False)
    frames = torch.rand(4, 5, 16, 16, 3, generator=torch.Generator().manual_seed(1))
    mean, logvar = posterior(vae, frames)
    before = decode_video(vae, mean, clamp=False)
    flat = mean.movedim(1, 0).flatten(1)
    fold_statistics(vae, flat.mean(1), flat.std(1))
    folded, folded_logvar = posterior(vae, frames)
    again = folded.movedim(1, 0).flatten(1)
    assert again.mean(1).abs().max() < 1e-4 and (again.std(1) - 1).abs().max() < 1e-4
    assert (decode_video(vae, folded, clamp=False) - before).abs().max() < 1e-3
    ratio = (folded_logvar - logvar).movedim(1, 0).flatten(1)
    assert (ratio + 2 * flat.std(1, keepdim=True).log()).abs().max() < 1e-3
    assert torch.equal(encode_video(vae, frames), folded)
