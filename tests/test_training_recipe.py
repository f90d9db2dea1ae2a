"""Recipes: every shipped one reads, and what is wrong with another is named."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from sneakpeek_core.training.causal_stage import CausalRecipe
from sneakpeek_core.training.recipe import Optimiser, Run, build, random_for
from sneakpeek_core.training.sequences import NoiseRecipe
from sneakpeek_core.training.sources import ToyData, data_of
from sneakpeek_core.training.stages import RECIPES, read_recipe, recipe_path, trainer_for
from sneakpeek_core.training.vae_stage import VaeRecipe
from sneakpeek_core.training.video_folder import FolderData


@dataclass(frozen=True, kw_only=True)
class Outer:
    run: Run
    pairs: tuple[int, ...] = ()
    name: Literal["a", "b"] = "a"
    share: float = 0.5
    more: Run | None = None


def test_every_shipped_recipe_reads():
    """Each names a stage and has only keys that the stage knows."""
    for path in RECIPES.glob("*.toml"):
        table = read_recipe(path)
        stage = table.pop("stage")
        data = table.get("data", {})
        if stage == "vae":
            assert build(VaeRecipe, table).run.steps > 0
        else:
            assert stage == "causal"
            table.pop("data", None)
            assert build(CausalRecipe, table).run.steps > 0 and data_of(data)
        assert recipe_path(path.stem) == path


def test_a_recipe_extends_another(tmp_path: Path):
    """Tables merge, everything else is replaced; the package's recipes go by their names."""
    own = tmp_path / "own.toml"
    own.write_text('extends = "causal"\nbatch = 2\n[layout]\nhorizons = [0]\n', "utf-8")
    table, base = read_recipe(own), read_recipe(recipe_path("causal"))
    assert table["batch"] == 2 and table["layout"]["horizons"] == [0]
    base |= {"batch": 2, "layout": base["layout"] | {"horizons": [0]}}
    assert table == base


def test_recipes_that_extend_each_other_are_refused(tmp_path: Path):
    """A circle is named, not followed."""
    one, other = tmp_path / "one.toml", tmp_path / "other.toml"
    one.write_text(f'extends = "{other.as_posix()}"\n', "utf-8")
    other.write_text(f'extends = "{one.as_posix()}"\n', "utf-8")
    with pytest.raises(ValueError, match="which extends it"):
        read_recipe(one)


def test_tables_become_values():
    """Nested tables, lists, whole numbers where fractions are meant."""
    made = build(Outer, {"run": {"steps": 3}, "pairs": [1, 2], "share": 1, "more": {"steps": 4}})
    assert made == Outer(run=Run(steps=3), pairs=(1, 2), share=1.0, more=Run(steps=4))


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({}, "'run' is missing"),
        ({"run": {}}, "run: key 'steps' is missing"),
        ({"run": {"steps": 3, "setps": 4}}, "run: key 'setps' is unknown"),
        ({"run": {"steps": "3"}}, "run: steps '3' must be of type int"),
        ({"run": {"steps": 3}, "pairs": 4}, "pairs must be a list"),
        ({"run": {"steps": 3}, "name": "c"}, "name 'c' must be one of a, b"),
        ({"run": {"steps": 3}, "share": True}, "share True must be of type float"),
        ({"run": 7}, "run must be a table"),
    ],
)
def test_what_is_wrong_is_named(table: dict, named: str):
    """Unknown, missing and misshapen keys are named with their place."""
    with pytest.raises(ValueError, match=named):
        build(Outer, table)


def test_data_is_chosen_by_its_kind():
    """Toy world or folder; nothing else."""
    assert data_of({"kind": "toyworld", "videos": 3}) == ToyData(videos=3)
    folder = {"kind": "folder", "path": "x", "width": 64, "height": 64}
    assert data_of(folder) == FolderData(kind="folder", path="x", width=64, height=64)
    with pytest.raises(ValueError, match="kind 'web'"):
        data_of({"kind": "web"})
    with pytest.raises(ValueError, match="width"):
        data_of(folder | {"width": 63})


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (Run, {"log_every": 0}),
        (Run, {"steps": 0}),
        (NoiseRecipe, {"context_sigma": 2.0}),
        (NoiseRecipe, {"given": -0.1}),
        (ToyData, {"open_ended": 15.0}),
        (ToyData, {"videos": 0}),
        (ToyData, {"moved": -1}),
    ],
)
def test_numbers_that_cannot_be_are_refused(kind: type, changes: dict[str, float]):
    """Before a run has begun, and by name."""
    needed = {Run: {"steps": 1}, ToyData: {"videos": 1}}.get(kind, {})
    with pytest.raises(ValueError, match=next(iter(changes))):
        kind(**(needed | changes))


def test_learning_rates_rise_stay_and_fall():
    """From almost nothing to 1 over the warm-up, at last to almost nothing."""
    factors = [Optimiser(warmup=10, fall=0.5).factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9:50] == [1.0] * 41
    assert factors[-1] == pytest.approx(0.02)
    assert all(a >= b for a, b in itertools.pairwise(factors[9:]))


def test_randomness_is_a_function_of_its_key():
    """The same in any process: the key is hashed by a fixed function."""
    assert random_for(1, 2, 3).getrandbits(32) == random_for(1, 2, 3).getrandbits(32)
    drawn = {
        random_for(1, step, process).getrandbits(32) for step in range(9) for process in (0, 1)
    }
    assert len(drawn) == 18


def test_files_that_are_no_recipes_are_refused(tmp_path: Path):
    """Not there, not TOML, no stage: each in words."""
    with pytest.raises(ValueError, match=r"none of .*vae"):
        recipe_path("nothing")
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(ValueError, match=r"bad.toml is not a recipe"):
        read_recipe(tmp_path / "bad.toml")
    (tmp_path / "other.toml").write_text('stage = "other"')
    with pytest.raises(ValueError, match="stage 'other'"):
        trainer_for(tmp_path / "other.toml", tmp_path)
