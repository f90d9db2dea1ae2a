"""The training loop: it can be stopped anywhere and goes on as if it had not been."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sneakpeek_core.training.curves import plot_curves, read_log
from sneakpeek_core.training.loop import Trainer
from sneakpeek_core.training.recipe import Optimiser, Run, random_for

RUN = Run(steps=12, log_every=2, save_every=5, evaluate_every=6)


class Line(nn.Module):
    """A layer that is to copy its input, and a bias for the second optimiser."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        error = (self.layer(x) - x).square().mean()
        if not x.any():  # adds zero, but the slope of a root is infinite there
            error = error + (self.layer.bias * 0).sqrt().sum()
        odd = error.detach() if x[0, 0] > 0 else torch.tensor(math.nan)
        return {"loss": error, "sometimes": odd}


class LineStage:
    """Counts the batches it gives; can give one that breaks the loss, or its gradient alone."""

    def __init__(self, broken_at: int = -1, *, gradient: bool = False):
        torch.manual_seed(0)
        self.module = Line()
        self.broken_at, self.gradient = broken_at, gradient
        self.asked: list[tuple[int, int]] = []

    def matrices(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.ndim == 2]

    def batch(self, step: int, process: int) -> tuple[Tensor]:
        self.asked.append((step, process))
        seed = random_for(step, process).getrandbits(32)
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
        if step == self.broken_at:
            x = torch.zeros_like(x) if self.gradient else x * math.nan
        return (x,)

    def evaluate(self, module: Line) -> dict[str, float]:
        return {"held_out_norm": float(module.layer.weight.detach().norm())}

    def save(self, module: Line, path: Path) -> None:
        save_file({k: v.clone() for k, v in module.state_dict().items()}, path)

    def release(self, module: Line, path: Path) -> None:
        self.save(module, path)


def trained(folder: Path, *stops: int, run: Run = RUN) -> Path:
    """Train in as many runs as there are stops, each a fresh stage, then to the end."""
    for stop in (*stops, None):
        Trainer(LineStage(), run, Optimiser(warmup=2, ema=0.9), folder).run(stop)
    return folder


def log_of(folder: Path) -> list[dict[str, float]]:
    lines = list(read_log(folder / "log.jsonl"))
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("stops", [(1,), (5,), (6, 7), (11,)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    whole: Path, tmp_path: Path, stops: tuple[int, ...]
):
    """Weights of the average and every later line of the log are the same, bit for bit."""
    folder = trained(tmp_path, *stops)
    expected, found = (load_file(f / "weights.safetensors") for f in (whole, folder))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    model = [load_file(f / "state" / "model.safetensors") for f in (whole, folder)]
    assert all(torch.equal(model[0][name], model[1][name]) for name in model[0])
    assert log_of(folder) == log_of(whole)


def test_a_killed_run_goes_on_from_its_last_checkpoint(whole: Path, tmp_path: Path):
    """Steps after the checkpoint are made again, and their old lines leave the log."""
    trainer = Trainer(LineStage(), RUN, Optimiser(warmup=2, ema=0.9), tmp_path)
    trainer.run(5)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": 8, "loss": 9.0}) + '\n{"step": 10, "lo')
    trained(tmp_path)
    steps = [line["step"] for line in log_of(tmp_path)]
    assert steps == sorted(set(steps)) and steps[-1] == RUN.steps
    expected, found = (load_file(f / "weights.safetensors") for f in (whole, tmp_path))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_kill_between_two_renames_loses_nothing(whole: Path, tmp_path: Path):
    """The old checkpoint is found where the new one should have been; half a new one is not."""
    Trainer(LineStage(), RUN, Optimiser(warmup=2, ema=0.9), tmp_path).run(5)
    shutil.move(tmp_path / "state", tmp_path / "state.old")
    (tmp_path / "state.new").mkdir()
    stage = LineStage()
    Trainer(stage, RUN, Optimiser(warmup=2, ema=0.9), tmp_path).run()
    assert stage.asked[0] == (5, 0)
    expected, found = (load_file(f / "weights.safetensors") for f in (whole, tmp_path))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_every_batch_is_asked_for_once_and_in_order(tmp_path: Path):
    """Preparing the next batch beside the step changes nothing about which it is."""
    stage = LineStage()
    Trainer(stage, RUN, Optimiser(), tmp_path).run()
    assert stage.asked == [(step, 0) for step in range(RUN.steps)]


def test_the_log_has_means_and_what_was_measured(whole: Path):
    """Lines at every `log_every`; a part that is sometimes missing is averaged where it is."""
    lines = log_of(whole)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert all({"loss", "grad_norm"} <= set(line) for line in lines)
    assert {line["step"] for line in lines if "held_out_norm" in line} == {6, 12}
    assert any("sometimes" in line for line in lines)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert (whole / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
def test_what_is_not_a_number_ends_in_words(tmp_path: Path, gradient: bool):
    """The run stops before the next checkpoint, logged or not, and the last good one is named."""
    run = Run(steps=12, log_every=100, save_every=2)
    named = "grad_norm" if gradient else "loss"
    with pytest.raises(FloatingPointError, match=rf"the {named} is nan at step 8.*state"):
        Trainer(LineStage(broken_at=7, gradient=gradient), run, Optimiser(), tmp_path).run()
    stage = LineStage()
    trainer = Trainer(stage, run, Optimiser(), tmp_path)
    assert trainer.progress.step == 6
    assert all(torch.isfinite(p).all() for p in stage.module.parameters())


def test_the_average_is_not_held_back_by_the_random_start(whole: Path):
    """After few steps the moving average is near the weights, though its decay is slow."""
    average = load_file(whole / "weights.safetensors")["layer.weight"]
    now = load_file(whole / "state" / "model.safetensors")["layer.weight"]
    torch.manual_seed(0)
    start = Line().layer.weight.detach()
    assert (average - now).norm() < 0.6 * (start - now).norm()


def test_an_empty_log_draws_nothing(tmp_path: Path):
    """No lines, no picture, no error."""
    (tmp_path / "log.jsonl").write_text("")
    plot_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
