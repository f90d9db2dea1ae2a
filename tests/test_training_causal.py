"""Stage 1: batches that can be made again, and a forward that is the engine's."""

from __future__ import annotations

import dataclasses
import math
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sneakpeek_core.denoiser import Branch, Denoiser
from sneakpeek_core.guidance import FutureGuidance
from sneakpeek_core.model.forward import Host
from sneakpeek_core.model.initial import randomise
from sneakpeek_core.model.parallel import MaskedExtend
from sneakpeek_core.model.rope import rope_for
from sneakpeek_core.model.weights import load_transformer
from sneakpeek_core.training.causal_stage import (
    CausalRecipe,
    CausalStage,
    ModelRecipe,
    SamplingRecipe,
)
from sneakpeek_core.training.cuts import cut
from sneakpeek_core.training.layout import LayoutRecipe, SketchRecipe
from sneakpeek_core.training.recipe import Run
from sneakpeek_core.training.sequences import KINDS, Batch, NoiseRecipe

CELLS = 4
SIZES = ModelRecipe(dim=128, ffn_dim=128, layers=2, text_dim=16, text_len=12)
RECIPE = CausalRecipe(run=Run(steps=10, seed=3), model=SIZES, batch=3, held_out=4, span=9)


@dataclass
class FakeVideo:
    latents: Tensor
    ends: Tensor
    steps: list[tuple[str, int]]


@dataclass
class FakeVideos:
    """Ten videos of two steps of random latents; texts of different lengths."""

    videos: list[FakeVideo] = field(default_factory=list)

    def __post_init__(self) -> None:
        for number in range(10):
            rng = torch.Generator().manual_seed(number)
            self.videos.append(
                FakeVideo(
                    torch.randn(16, 9, CELLS, CELLS, generator=rng),
                    torch.randn(2, 16, CELLS, CELLS, generator=rng),
                    [("short", 4), ("a longer text", 4)],
                )
            )

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> FakeVideo:
        return self.videos[index]

    def text(self, sentence: str) -> Tensor:
        tokens = 2 + len(sentence.split())
        rng = torch.Generator().manual_seed(len(sentence))
        return torch.randn(tokens, SIZES.text_dim, generator=rng)


def stage(recipe: CausalRecipe = RECIPE, seed: int | None = 1) -> CausalStage:
    """A stage whose transformer is random in every parameter (None: as training begins)."""
    made = CausalStage(recipe, FakeVideos())
    if seed is not None:
        randomise(made.module.tree, seed)
    return made


def test_a_batch_is_a_function_of_seed_step_and_process():
    """The same three give the same batch; another step, process or seed another one."""
    batch = stage().batch(5, 1)
    assert all(torch.equal(a, b) for a, b in zip(batch, stage().batch(5, 1), strict=True))
    other = replace(RECIPE, run=replace(RECIPE.run, seed=4))
    for different in (stage().batch(6, 1), stage().batch(5, 0), stage(other).batch(5, 1)):
        assert not torch.equal(batch.flow_BCFHW[:1, :, :1], different.flow_BCFHW[:1, :, :1])


def test_held_out_videos_are_never_trained_on():
    """No frame of the first `held_out` videos is in any batch."""
    made = stage()
    held = torch.stack([made.videos[i].latents for i in range(RECIPE.held_out)])
    for step in range(20):
        batch = made.batch(step, 0)
        sigmas = batch.sigmas_BF[:, None, :, None, None]
        clean = batch.x_BCFHW - sigmas * batch.flow_BCFHW
        learned = batch.weights_BF > 0
        for frame in clean.transpose(1, 2)[learned]:
            assert (held.transpose(1, 2).flatten(0, 1) - frame).abs().amax((1, 2, 3)).min() > 0.1


def test_what_is_learned_is_the_flow_to_the_video_s_own_frames():
    """x - sigma * flow is the clean latent of each open frame and target; guides have no weight."""
    made = stage()
    batch = made.batch(2, 0)
    clean = batch.x_BCFHW - batch.sigmas_BF[:, None, :, None, None] * batch.flow_BCFHW
    frames = torch.cat([made.videos[i].latents for i in range(len(made.videos))], 1)
    for row, column in (batch.weights_BF > 0).nonzero().tolist():
        number = int(batch.positions_BF[row, column])
        own = frames[:, number::9].transpose(0, 1)
        assert (own - clean[row, :, column]).abs().amax((1, 2, 3)).min() < 1e-4
    keys = batch.kinds_BF == KINDS.index("key")
    assert torch.equal(batch.weights_BF[keys], torch.full((int(keys.sum()),), 3.0))


def pictured(made: CausalStage, batch: Batch) -> list[tuple[int, int]]:
    """Row and column of every frame that is a picture encoded alone, without noise."""
    pictures = torch.cat([made.videos[i].ends for i in range(len(made.videos))])
    found = []
    for row in range(len(batch.x_BCFHW)):
        for column in range(batch.x_BCFHW.shape[2]):
            x = batch.x_BCFHW[row, :, column]
            if (pictures - x).abs().amax((1, 2, 3)).min() < 1e-6:
                found.append((row, column))
    return found


def test_given_guides_are_pictures_encoded_alone_without_noise():
    """With `given` at 1 every plan has one at least, told as clean; at 0 there are none."""
    alone = replace(RECIPE, layout=LayoutRecipe(horizons=(1,), late=0.0))
    made = stage(replace(alone, noise=NoiseRecipe(given=1.0)))
    batch = made.batch(1, 0)
    found = pictured(made, batch)
    assert len(found) == 2 * RECIPE.batch  # a plan per step
    for row, column in found:
        assert batch.sigmas_BF[row, column] == 0 and batch.weights_BF[row, column] == 0
    none = stage(replace(alone, noise=NoiseRecipe(given=0.0)))
    assert not pictured(none, none.batch(1, 0))


def test_predicted_keyframes_learn_beside_given_ones():
    """Of a plan of two, one may be given: the other target sees it, and only that one learns."""
    layout = LayoutRecipe(horizons=(2,), late=0.0, reaches=(18,))
    made = stage(replace(RECIPE, layout=layout, noise=NoiseRecipe(given=1.0)))
    mixed = 0
    for step in range(8):
        batch = made.batch(step, 0)
        for row, column in pictured(made, batch):
            beside = batch.mask_BFF[row, :, column] & (batch.kinds_BF[row] == KINDS.index("key"))
            assert batch.weights_BF[row, column] == 0
            mixed += int(beside.any())
    assert mixed


def test_hidden_noise_is_not_told():
    """What the model made itself is noisier than it is told, by at most `hidden`.

    The start picture is exact.
    """
    told_clean = NoiseRecipe(clean_context=1.0, clean_guides=1.0, given=0.0, hidden=0.3)
    batch = stage(replace(RECIPE, noise=told_clean)).batch(0, 0)
    exact = stage(replace(RECIPE, noise=replace(told_clean, hidden=0.0))).batch(0, 0)
    shown = (batch.sigmas_BF == 0) & (batch.kinds_BF == -1)
    assert torch.equal(batch.sigmas_BF, exact.sigmas_BF)
    change = (batch.x_BCFHW - exact.x_BCFHW).square().mean((1, 3, 4)).sqrt()
    start = shown & (batch.positions_BF == 0)
    assert start.any() and not change[start].any()
    others = change[shown & ~start]
    assert (others > 0).all()
    # x = (1 - s) clean + s noise, both of variance one: at most sqrt(2) s away
    assert others.max() < 0.3 * 2**0.5 * 1.3


def test_forward_is_the_engine_s():
    """One row through the stage equals the denoiser with its texts padded to full length."""
    made = stage()
    with torch.no_grad():
        batch = made.batch(4, 0)
        flow = made.module.flow(batch)
        denoiser = Denoiser(made.module.tree, text_len=SIZES.text_len, host=Host())
        for row in range(RECIPE.batch):
            positions = batch.positions_BF[row].tolist()
            texts = [made.videos.text("short")[None], made.videos.text("a longer text")[None]]
            told = [texts[int(frame >= 5)] for frame in positions]
            extend = MaskedExtend(batch.mask_BFF[row], 4)
            rope = rope_for([float(p) for p in positions], 2, 2, head_dim=128)
            expected = denoiser.flow(
                batch.x_BCFHW[row, None], batch.sigmas_BF[row, None], rope,
                [Branch(told, extend, {})],
            )  # fmt: skip
            assert (flow[row] - expected[0]).abs().max() < 2e-4 * expected.abs().max()


def test_chunks_see_the_start_where_the_sampler_puts_it():
    """Directly before their window, with the same noise for all of them: it is one picture."""
    layout = LayoutRecipe(chunks=(1,), windows=(3,), windowed=1.0, sink=1.0, horizons=(0,))
    batch = stage(replace(RECIPE, layout=layout)).batch(0, 0)
    for x, positions, weights in zip(
        batch.x_BCFHW, batch.positions_BF, batch.weights_BF, strict=True
    ):
        starts = (x == x[:, :1]).flatten(2).all(2).all(0)
        assert positions[starts].tolist() == [0, 1, 2, 3, 4, 5]
        assert not weights[starts].any()


def test_checkpointing_changes_memory_alone():
    """The loss and every gradient are the same whether activations are kept or made again."""
    made = {}
    for checkpointing in (False, True):
        one = stage(replace(RECIPE, checkpointing=checkpointing))
        loss = one.module(*one.batch(0, 0))["loss"]
        loss.backward()
        made[checkpointing] = [loss, *(p.grad for p in one.module.parameters())]
    for kept, again in zip(*made.values(), strict=True):
        assert kept is not None and again is not None
        assert torch.allclose(kept, again, rtol=1e-5, atol=1e-7)


def test_a_share_of_batches_are_sketches():
    """They hold step ends alone, of their own number of videos, and are a function of the seed."""
    made = stage(replace(RECIPE, sketch=SketchRecipe(share=0.5, batch=5, draws=2)))
    batches = [made.batch(step, 0) for step in range(30)]
    sketches = [batch for batch in batches if len(batch.x_BCFHW) == 5]
    assert 5 < len(sketches) < 25
    assert {len(batch.x_BCFHW) for batch in batches} == {RECIPE.batch, 5}
    for batch in sketches:
        assert set(batch.positions_BF.flatten().tolist()) == {0, 4, 8}
        learned = batch.weights_BF > 0
        assert learned.sum() == 5 * 2 * 2 and torch.equal(learned, batch.kinds_BF == 2)
    again = stage(made.recipe).batch(3, 0)
    assert all(map(torch.equal, again, batches[3]))
    only = stage(replace(RECIPE, sketch=SketchRecipe(share=1.0, batch=3)))
    assert all(len(only.batch(step, 0).x_BCFHW) == 3 for step in range(8))
    assert only.module(*only.batch(0, 0))["loss"].isfinite()


def test_frames_weigh_in_the_loss_alone():
    """The loss is the mean of frames by their weights; the log does not know them."""
    one = stage()
    batch = one.batch(0, 0)
    with torch.no_grad():
        error_BF = (one.module.flow(batch) - batch.flow_BCFHW).square().mean((1, 3, 4))
        found = one.module(*batch)
        alike = one.module(*batch._replace(weights_BF=(batch.weights_BF > 0).float()))
    expected = (batch.weights_BF * error_BF).sum() / batch.weights_BF.sum()
    assert torch.allclose(found["loss"], expected, rtol=1e-5)
    assert not torch.allclose(alike["loss"], expected, rtol=1e-3)
    assert torch.equal(found["key"], alike["key"])


def test_a_fresh_model_predicts_nothing_and_learns():
    """At first the flow is zero everywhere; some steps of gradient descent lower the loss."""
    made = stage(seed=None)
    batch = made.batch(0, 0)
    assert not made.module.flow(batch).any()
    optimiser = torch.optim.AdamW(made.module.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        loss = made.module(*batch)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_evaluation_is_the_same_every_time():
    """Held-out losses use the same noise at every call, and name every kind of frame."""
    made = stage()
    first = made.evaluate(made.module)
    assert first == made.evaluate(made.module)
    assert {f"held_out_{kind}" for kind in ("loss", *KINDS)} <= set(first)
    assert all(math.isfinite(value) for value in first.values())


def test_saved_weights_say_how_to_sample_them(tmp_path: Path):
    """The file loads as a model of ours, with shift and trained span."""
    made = stage()
    made.save(made.module, tmp_path / "model.safetensors")
    loaded = load_transformer(tmp_path / "model.safetensors")
    assert loaded.preset.name == "tiny"
    assert (loaded.preset.shift, loaded.preset.trained_span) == (3.0, 9)
    assert loaded.config.text_len == SIZES.text_len
    assert dataclasses.asdict(loaded.config)["layers"] == SIZES.layers
    sampling = SamplingRecipe(chunk=1, sampling_steps=2, window=5, horizon=2, plan_passes=3)
    made = stage(replace(RECIPE, sampling=sampling))
    made.release(made.module, tmp_path / "model.safetensors")
    preset = load_transformer(tmp_path / "model.safetensors").preset
    assert (preset.chunk, preset.window, len(preset.sigmas)) == (1, 5, 3)
    assert preset.guidance == FutureGuidance(count=2, plan_passes=3)
    made = stage(replace(RECIPE, sampling=replace(sampling, guided=False)))
    made.save(made.module, tmp_path / "model.safetensors")
    assert load_transformer(tmp_path / "model.safetensors").preset.guidance is None


def cuts(video: FakeVideo, span: int) -> dict[int, tuple[list[float], list, list[float]]]:
    """All cuts of a video by where they begin: frames, steps, pictures of step ends."""
    made = [cut(video, span, random.Random(seed)) for seed in range(60)]
    return {
        round(part.latents.flatten().tolist()[1]) - 1: (
            part.latents.flatten().tolist(),
            list(part.steps),
            part.ends.flatten().tolist(),
        )
        for part in made
    }


def test_long_videos_are_cut_where_a_stream_could_begin():
    """A stretch begins with a picture encoded alone: the video's first, or the end of a step.

    Ten frames and two steps: 1 to 4 and 5 to 9.
    """
    video = FakeVideo(
        torch.arange(10.0).view(1, 10, 1, 1),
        torch.tensor([40.0, 90.0]).view(2, 1, 1, 1),
        [("a", 4), ("b", 5)],
    )
    assert cuts(video, 6) == {
        0: ([0, 1, 2, 3, 4, 5], [("a", 4), ("b", 1)], [40]),
        4: ([40, 5, 6, 7, 8, 9], [("b", 5)], [90]),
    }
    assert cut(video, 10, random.Random(0)) is video


def test_a_step_longer_than_the_span_is_cut_in_its_middle_too():
    """Nine frames in one step, then one of two: every frame is in some cut of six."""
    video = FakeVideo(
        torch.arange(12.0).view(1, 12, 1, 1),
        torch.tensor([90.0, 110.0]).view(2, 1, 1, 1),
        [("long", 9), ("b", 2)],
    )
    made = cuts(video, 6)
    assert {begin: steps for begin, (_, steps, _) in made.items()} == {
        0: [("long", 5)], 1: [("long", 5)], 2: [("long", 5)], 3: [("long", 5)],
        4: [("long", 5)], 9: [("b", 2)],
    }  # fmt: skip
    assert [made[begin][2] for begin in (3, 4, 9)] == [[], [90], [110]]


def test_cut_videos_train():
    """A span shorter than the videos: batches are made, and nothing lies beyond it."""
    made = stage(replace(RECIPE, span=6, layout=LayoutRecipe(windows=(4,), chunks=(1, 2))))
    batch = made.batch(0, 0)
    assert batch.positions_BF.max() == 5
    assert torch.isfinite(made.module(*batch)["loss"])


def test_what_training_does_not_change_is_sampled_as_before(tmp_path: Path):
    """From a stated file without [sampling]: chunk, passes and guidance stay, rate and span do not.

    A model that could not be streamed (Wan's own) can be, once it has been trained causally.
    """
    stage().save(stage().module, tmp_path / "start.safetensors")
    loaded = load_transformer(tmp_path / "start.safetensors")
    own = replace(
        loaded.preset, chunk=1, steps=7, shift=4.0, guidance=FutureGuidance(count=1),
        refusal="it sees everything",
    )  # fmt: skip
    made = CausalStage(RECIPE, FakeVideos(), replace(loaded, preset=own), fps=8.0)
    made.save(made.module, tmp_path / "trained.safetensors")
    preset = load_transformer(tmp_path / "trained.safetensors").preset
    preset.check_runnable()
    expected = replace(own, fps=8.0, refusal="", recognised_by=preset.recognised_by)
    assert preset == replace(expected, trained_span=RECIPE.span)


def test_too_few_videos_are_refused():
    """A data set that is all held out says so."""
    with pytest.raises(ValueError, match="held_out 10"):
        stage(replace(RECIPE, held_out=10))
