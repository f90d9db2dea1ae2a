"""The same command on one process and on two: recipes run to the end and hold equal weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sneakpeek_core.cli import main
from sneakpeek_core.model.weights import load_transformer
from sneakpeek_core.training.loop import Trainer
from sneakpeek_core.training.stages import trainer_for
from tests.command_line import Shelf, make_shelf
from tests.small import TEXT_DIM

RECIPE = """
stage = "causal"
batch = {batch}
held_out = 1
vae = "{shelf.vae}"
text_encoder = "{shelf.text_encoder}"

[data]
kind = "toyworld"
videos = 4
steps = 1

[run]
steps = 3
log_every = 1
save_every = 2
evaluate_every = 3

[optimiser]
warmup = 1

[model]
dim = 128
ffn_dim = 128
layers = 1
text_dim = {text_dim}
text_len = 16

[layout]
chunks = [3]
"""
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return make_shelf(tmp_path_factory.mktemp("shelf"))


def write_recipe(folder: Path, shelf: Shelf, batch: int = 2) -> Path:
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(shelf=shelf, batch=batch, text_dim=TEXT_DIM))
    return path


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_recipe_trains_from_the_command_line(tmp_path: Path, shelf: Shelf):
    """Encode, train, stop, go on: weights that load, a log, curves; latents serve another run."""
    recipe = str(write_recipe(tmp_path, shelf))
    out, cache = tmp_path / "run", tmp_path / "latents"
    train = ["train", recipe, "--out", str(out), "--cache", str(cache)]
    assert main([*train, "--until", "2"]) == 0
    assert lines(out)[-1]["step"] == 2
    assert main(train) == 0
    assert [line["step"] for line in lines(out)] == [1, 2, 3]
    assert load_transformer(out / "weights.safetensors").preset.name == "tiny"
    assert (out / "curves.png").exists() and len(list(cache.glob("0*.safetensors"))) == 4
    whole = [*train[:3], str(tmp_path / "whole"), *train[4:]]
    assert main(whole) == 0
    a, b = (load_file(f / "weights.safetensors") for f in (out, tmp_path / "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_recipe_goes_on_from_the_one_that_it_extends(tmp_path: Path, shelf: Shelf, capsys):
    """Sizes that it inherits are those of its start; others are refused."""
    first, cache = write_recipe(tmp_path, shelf), ["--cache", str(tmp_path / "latents")]
    assert main(["train", str(first), "--out", str(tmp_path / "first"), *cache]) == 0
    start = (tmp_path / "first" / "weights.safetensors").as_posix()
    second = tmp_path / "second.toml"
    second.write_text(f'extends = "{first.as_posix()}"\nstart = "{start}"\n')
    assert main(["train", str(second), "--out", str(tmp_path / "second"), *cache]) == 0
    second.write_text(second.read_text() + "[model]\nffn_dim = 256\n")
    assert main(["train", str(second), "--out", str(tmp_path / "other"), *cache]) == 2
    assert "first/weights.safetensors are others" in capsys.readouterr().err


def test_a_run_says_which_recipes_it_followed(
    tmp_path: Path, shelf: Shelf, caplog: pytest.LogCaptureFixture
):
    """A recipe may change between two parts of a run: what, and from which step on, stays told."""
    recipe, out = write_recipe(tmp_path, shelf), tmp_path / "run"
    train = ["train", str(recipe), "--out", str(out), "--cache", str(tmp_path / "latents")]
    assert main([*train, "--until", "2"]) == 0
    text = recipe.read_text()
    recipe.write_text(text.replace("warmup = 1", "warmup = 2"))
    assert main(train) == 0 and main(train) == 0  # the last adds nothing
    assert "from step 2 on the recipe is another: optimiser.warmup" in caplog.text
    told = [json.loads(line) for line in (out / "recipes.jsonl").read_text().splitlines()]
    assert [one["from_step"] for one in told] == [0, 2]
    assert [one["recipe"]["optimiser"]["warmup"] for one in told] == [1, 2]


def test_latents_stay_when_the_decoder_is_another(tmp_path: Path, shelf: Shelf, capsys):
    """They depend on the encoder alone; with another one they are refused."""
    recipe, cache = write_recipe(tmp_path, shelf), ["--cache", str(tmp_path / "latents")]
    assert main(["train", str(recipe), "--out", str(tmp_path / "first"), *cache]) == 0
    for part, code in (("decoder.", 0), ("encoder.", 2)):
        vae = tmp_path / f"{part}safetensors"
        with safe_open(shelf.vae, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(shelf.vae)
        changed = {k: v + 0.1 if k.startswith(part) else v for k, v in tensors.items()}
        save_file(changed, vae, metadata)
        other = tmp_path / f"{part}toml"
        other.write_text(f'extends = "{recipe.as_posix()}"\nvae = "{vae.as_posix()}"\n')
        out = ["--out", str(tmp_path / part)]
        assert main(["train", str(other), *out, *cache]) == code
    assert "were made with vae" in capsys.readouterr().err


def test_bad_calls_are_refused_in_words(tmp_path: Path, shelf: Shelf, capsys):
    """An unknown recipe, an impossible step, a file that is not there."""
    assert main(["train", "nothing", "--out", str(tmp_path / "a")]) == 2
    assert "none of" in capsys.readouterr().err
    recipe = write_recipe(tmp_path, shelf)
    assert main(["train", str(recipe), "--out", str(tmp_path / "a"), "--until", "0"]) == 2
    recipe.write_text(recipe.read_text().replace("videos = 4", "videos = 1"))
    assert main(["train", str(recipe), "--out", str(tmp_path / "b")]) == 2
    assert "held_out 1" in capsys.readouterr().err


@pytest.mark.timeout(400)
def test_two_processes_train_one_model(tmp_path: Path, shelf: Shelf):
    """Launched by torchrun on the CPU: both see batches of their own, and one log is written.

    Two processes with one video each: the logged loss is the mean over both, and so is the gradient
    that both apply. The head of a fresh model is zero, so only its third loss depends on every
    layer; it is worked out here on one process, from the mean of both losses.
    """
    recipe = write_recipe(tmp_path, shelf, batch=1)
    out = tmp_path / "two"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [
            sys.executable, *LAUNCH, "-m", "sneakpeek_core.cli",
            "train", str(recipe), "--out", str(out),
        ],
        cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True,
        timeout=360, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[:6000]
    assert [line["step"] for line in lines(out)] == [1, 2, 3]
    alone = trainer_for(recipe, tmp_path / "one", out / "latents")

    class Both(torch.nn.Module):
        """The mean of the two processes' losses, as one batch would have it."""

        def __init__(self, one: torch.nn.Module):
            super().__init__()
            self.one = one

        def forward(self, *parts: torch.Tensor) -> dict[str, torch.Tensor]:
            half = len(parts) // 2
            losses = [self.one(*parts[:half])["loss"], self.one(*parts[half:])["loss"]]
            assert losses[0] != losses[1]
            return {"loss": (losses[0] + losses[1]) / 2}

    class BothStage:
        module = Both(alone.stage.module)
        matrices = staticmethod(alone.stage.matrices)

        def batch(self, step: int, process: int) -> tuple:
            return (*alone.stage.batch(step, 0), *alone.stage.batch(step, 1))

        def evaluate(self, module: Both) -> dict[str, float]:
            return {}

        def save(self, module: Both, path: Path) -> None:
            alone.stage.save(module.one, path)

        release = save

    single = Trainer(BothStage(), alone.recipe, alone.optimiser, tmp_path / "both")
    single.run()
    expected = [line["loss"] for line in lines(tmp_path / "both")]
    assert [line["loss"] for line in lines(out)] == pytest.approx(expected, rel=1e-4)
    assert expected[2] != pytest.approx(expected[1], rel=1e-3)
