"""`sneakpeek train`: a recipe to weights; stopped, it goes on where it was."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

EXTRA = 'training needs more packages; install them with: pip install "sneakpeek[train]"'


def add(commands) -> None:
    """Add the command and its options."""
    command = commands.add_parser("train", help="train a model by a recipe, or go on training")
    command.set_defaults(run=run)
    add = command.add_argument
    add("recipe", metavar="RECIPE", help="a TOML file, or the name of one that comes along")
    add("--out", type=Path, required=True, metavar="FOLDER", help="checkpoints, log, weights")
    add("--cache", type=Path, metavar="FOLDER", help="encoded videos (default: in --out)")
    add("--release", type=Path, metavar="FILE", help="write the trained weights in bf16 as well")
    add("--until", type=int, metavar="STEP", help="stop there with a checkpoint")


def run(options: argparse.Namespace) -> int:
    """Train to the recipe's last step, or to --until."""
    for package in ("accelerate", "matplotlib", "peft", "tqdm"):
        if find_spec(package) is None:
            raise ValueError(f"{EXTRA} ({package} is missing)")
    from ..training.stages import recipe_path, trainer_for

    if options.until is not None and options.until < 1:
        raise ValueError(f"until {options.until} must be a step from 1 on")
    if options.release and not options.release.absolute().parent.is_dir():
        raise ValueError(f"folder {options.release.parent} does not exist; make it first")
    trainer = trainer_for(recipe_path(options.recipe), options.out, options.cache)
    trainer.run(options.until)
    print(f"weights: {options.out / 'weights.safetensors'}", file=sys.stderr)
    if options.release:
        trainer.release(options.release)
        print(f"released: {options.release}", file=sys.stderr)
    return 0
