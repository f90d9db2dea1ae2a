"""Training on the model's own past: what it predicts is what is shown, and only where it may be."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sneakpeek_core.training.causal_stage import CausalStage
from sneakpeek_core.training.curves import read_log
from sneakpeek_core.training.layout import SketchRecipe
from sneakpeek_core.training.loop import Trainer
from sneakpeek_core.training.own_past import OwnPastRecipe, with_own_past
from sneakpeek_core.training.recipe import Run
from sneakpeek_core.training.sequences import KINDS, Batch, NoiseRecipe

from .test_training_causal import RECIPE, FakeVideos, pictured, stage

KEY = KINDS.index("key")
NOISE = NoiseRecipe(clean_context=0.3, context_sigma=0.5, hidden=0.0, given=0.5)
OWN = replace(RECIPE, noise=NOISE, own_past=OwnPastRecipe(share=1.0, passes=1, sigma=0.8))
SKETCHES = SketchRecipe(share=0.3, batch=3, anywhere=0.5)


def clean_of(made: CausalStage, batch: Batch, row: int, column: int) -> Tensor:
    """The true latent of a frame: the row's video is known by what it learns."""
    learned = int((batch.weights_BF[row] > 0).nonzero()[0])
    sigma = batch.sigmas_BF[row, learned]
    own = batch.x_BCFHW[row, :, learned] - sigma * batch.flow_BCFHW[row, :, learned]
    frame = int(batch.positions_BF[row, learned])
    videos = [made.videos[i].latents for i in range(len(made.videos))]
    video = min(videos, key=lambda latents: float((latents[:, frame] - own).abs().max()))
    return video[:, int(batch.positions_BF[row, column])]


def test_what_is_predicted_is_what_is_shown():
    """A past frame is (1 - s) of its predicted latent and s of noise, s being what is told."""
    made, again = stage(OWN), stage(replace(OWN, own_past=OwnPastRecipe(share=1.0, sigma=0.8)))
    batch = made.batch(2, 0)
    asked: list[Batch] = []

    def flow_of(one: Batch) -> Tensor:
        asked.append(one)
        return again.module.flow(one)

    shown = with_own_past(batch, OWN.own_past, flow_of)
    (noisy,) = asked
    with torch.no_grad():
        latents = noisy.x_BCFHW - 0.8 * again.module.flow(noisy)
    compared = 0
    for row, column in (batch.sources_BF >= 0).nonzero().tolist():
        source, told = int(batch.sources_BF[row, column]), batch.sigmas_BF[row, column]
        clean = clean_of(made, batch, row, column)
        noise = batch.flow_BCFHW[row, :, column] + clean
        expected = (1 - told) * latents[row, :, source] + told * noise
        assert torch.allclose(shown.x_BCFHW[row, :, column], expected, atol=1e-4)
        assert noisy.sigmas_BF[row, source] == pytest.approx(0.8)
        compared += int(told > 0)
    assert compared > 3
    others = batch.sources_BF < 0
    before, after = batch.x_BCFHW.transpose(1, 2), shown.x_BCFHW.transpose(1, 2)
    assert torch.equal(after[others], before[others])
    assert all(
        torch.equal(a, b) for a, b in zip(batch[1:], shown[1:], strict=True)
    )  # what is learned, and from what noise


def test_a_further_pass_sees_the_errors_of_the_one_before():
    """The past of pass n is what pass n - 1 predicted; the last one's is what is learned from."""
    batch = stage(OWN).batch(1, 0)
    asked: list[Tensor] = []
    answers = [torch.randn_like(batch.x_BCFHW) for _ in range(3)]

    def flow_of(one: Batch) -> Tensor:
        asked.append(one.x_BCFHW)
        return answers[len(asked) - 1]

    shown = with_own_past(batch, OwnPastRecipe(share=1.0, passes=3, sigma=0.6), flow_of).x_BCFHW
    assert len(asked) == 3
    signal_BF = 1 - batch.sigmas_BF
    for row, column in (batch.sources_BF >= 0).nonzero().tolist():
        source = int(batch.sources_BF[row, column])
        for answer, seen in zip(answers, [*asked[1:], shown], strict=True):
            error = 0.6 * (batch.flow_BCFHW - answer)[row, :, source]
            expected = batch.x_BCFHW[row, :, column] + signal_BF[row, column] * error
            assert torch.allclose(seen[row, :, column], expected, atol=1e-5)


def test_sources_are_where_the_same_frame_is_predicted():
    """A past frame was open, a guide was its own plan's target; in a sketch all were targets."""
    made = stage(replace(OWN, sketch=SKETCHES))
    found = {"open": 0, "target": 0, "sketch": 0}
    for step in range(16):
        batch = made.batch(step, 0)
        learned, kinds = batch.weights_BF > 0, batch.kinds_BF
        given = set(pictured(made, batch))
        for row in range(len(kinds)):
            sketch = not (learned[row] & (kinds[row] != KEY)).any()
            for column in range(kinds.shape[1]):
                source = int(batch.sources_BF[row, column])
                picture, first = batch.x_BCFHW[row, :, column], batch.x_BCFHW[row, :, 0]
                start = torch.equal(picture, first)  # or a copy of it
                padding = batch.positions_BF[row, column] == 0
                if learned[row, column] or start or padding or (row, column) in given:
                    assert source == -1
                    continue
                if source == -1:  # its target was a goal image, or is not drawn in this sketch
                    assert sketch or any(at == row for at, _ in given)
                    continue
                assert learned[row, source]
                assert batch.positions_BF[row, source] == batch.positions_BF[row, column]
                guide = kinds[row, source] == KEY and not sketch
                if guide:  # one plan: made at one time, from one past
                    mask, positions = batch.mask_BFF[row], batch.positions_BF[row]
                    plan = positions[mask[source] & learned[row]]
                    past = ~learned[row] & (positions < plan.min())
                    assert torch.equal(mask[column] & past, mask[source] & past)
                found["sketch" if sketch else "target" if guide else "open"] += 1
    assert min(found.values()) > 5, found


def test_a_share_of_pasts_is_the_model_s_own():
    """At a half some sequences have a true past and some their own, none a mixture; at 0 none."""
    made = stage(replace(OWN, own_past=OwnPastRecipe(share=0.5)))
    seen = set()
    for step in range(12):
        batch = made.batch(step, 0)
        for row in range(len(batch.kinds_BF)):
            sources = batch.sources_BF[row]
            kinds = batch.kinds_BF[row]
            pasts = {
                int(frame) for frame, source in zip(batch.positions_BF[row], sources, strict=True)
                if source >= 0 and kinds[source] != KEY
            }  # fmt: skip
            last = int(batch.positions_BF[row, kinds >= 0].max())
            assert not pasts or pasts >= set(range(1, last - 2))  # the last chunk is no past
            seen.add(bool(pasts))
    assert seen == {True, False}
    assert (stage(RECIPE).batch(0, 0).sources_BF == -1).all()


def test_own_pasts_begin_where_they_are_told_to():
    """Before that share of the run every past is true, and a step costs one forward."""
    made = stage(replace(OWN, own_past=OwnPastRecipe(share=1.0, begin=0.5)))
    own = [bool((made.batch(step, 0).sources_BF >= 0).any()) for step in range(RECIPE.run.steps)]
    assert own == [False] * 5 + [True] * 5

    def never(batch: Batch) -> Tensor:
        raise AssertionError("nothing is to be predicted")

    early = made.batch(4, 0)
    assert with_own_past(early, OWN.own_past, never) is early


def test_gradients_come_from_the_last_forward_alone():
    """They are those of an ordinary step on the batch with its own past."""
    made, plain = stage(OWN), stage(replace(OWN, own_past=OwnPastRecipe()))
    batch = made.batch(0, 0)
    made.module(*batch)["loss"].backward()
    plain.module(*with_own_past(batch, OWN.own_past, plain.module.flow))["loss"].backward()
    pairs = zip(made.module.parameters(), plain.module.parameters(), strict=True)
    for one, other in pairs:
        assert one.grad is not None and other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_own_pasts_train_in_bf16(tmp_path: Path):
    """Under autocast, as recipes for large models ask for: finite, and every layer learns."""
    run = Run(steps=3, seed=3, log_every=1, precision="bf16")
    made = CausalStage(replace(OWN, run=run), FakeVideos())
    before = {name: p.detach().clone() for name, p in made.module.named_parameters()}
    Trainer(made, run, replace(OWN.optimiser, warmup=1), tmp_path).run()
    losses = [line["loss"] for line in read_log(tmp_path / "log.jsonl")]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    after = dict(made.module.named_parameters())
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_evaluation_sees_true_pasts():
    """Held-out losses can be compared with those of a run without."""
    own, plain = stage(OWN), stage(replace(OWN, own_past=OwnPastRecipe()))
    assert own.evaluate(own.module.eval()) == plain.evaluate(plain.module.eval())


@pytest.mark.parametrize(
    "changes",
    [
        {"begin": 2.0},
        {"share": 1.5},
        {"share": -0.1},
        {"passes": 0},
        {"sigma": 0.0},
        {"sigma": 2.0},
    ],
)
def test_bad_numbers_are_refused_by_name(changes: dict[str, Any]):
    """What cannot be says which number it is."""
    with pytest.raises(ValueError, match=next(iter(changes))):
        OwnPastRecipe(**changes)
