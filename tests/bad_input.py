"""Bad input as rows of a table, and how a row is run: refused in one line, nothing touched."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sneakpeek_core.cli import main
from sneakpeek_core.model.initial import random_transformer
from sneakpeek_core.model.weights import save_model
from sneakpeek_core.sampler import Rollout
from tests.command_line import SIZE, STATED, STEPS, Shelf, contents, generate, make_shelf
from tests.small import CONFIG

MORE = "[0.5s] turn it\n[0.5s] let it go\n"
Build = Callable[[Path, Shelf], list[str]]


@dataclass(frozen=True)
class Row:
    """A bad input: how it is made (the options come back), what is blamed, and the fix."""

    name: str
    build: Build
    blames: str  # a pattern: the offending name or value
    fix: str  # a pattern
    bare: bool = False  # without the default steps and size


def given(*options: str) -> Build:
    return lambda folder, shelf: list(options)


def folder_named(name: str, *options: str) -> Build:
    def build(folder: Path, shelf: Shelf) -> list[str]:
        (folder / name).mkdir()
        return list(options)

    return build


def file_named(name: str, *options: str, content: bytes = b"precious") -> Build:
    def build(folder: Path, shelf: Shelf) -> list[str]:
        (folder / name).write_bytes(content)
        return list(options)

    return build


def weights(role: str, make: Callable[[Path], object], name: str = "bad.safetensors") -> Build:
    """One of the three files is bad."""

    def build(folder: Path, shelf: Shelf) -> list[str]:
        make(folder / name)
        return [*shelf.options, role, name]

    return build


def transformer(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """A file of the small model with something changed."""

    def make(path: Path) -> None:
        tensors = random_transformer(CONFIG, 0).state_dict()
        change(tensors)
        save_model(path, tensors, {"sneakpeek": STATED})

    return make


def stating(**fields: object) -> Callable[[Path], object]:
    """A file of the small model whose metadata says something else."""
    tensors = random_transformer(CONFIG, 0).state_dict
    return lambda path: save_model(path, tensors(), {"sneakpeek": STATED | fields})


def make_stocked_shelf(folder: Path) -> Shelf:
    """A model, a cache of it, and the journal of a video that was stopped."""
    made = make_shelf(folder)
    (folder / "steps.txt").write_text(STEPS)
    arguments = [*made.options, "--steps", folder / "steps.txt", *SIZE]
    arguments += ["--save-cache", folder / "good.cache"]
    assert generate(*arguments, "--out", folder / "done.mp4") == 0
    make = Rollout.make
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rollout, "make", lambda self, c: make(self, c) if self.chunk < 1 else full())
        assert generate(*arguments[:-2], "--out", folder / "stopped.mp4") == 1
    transformer(lambda tensors: tensors["head.head.bias"].add_(1))(folder / "other.safetensors")
    return made


def full() -> torch.Tensor:
    raise OSError(28, "No space left on device")


def forbid_sampling(patch: pytest.MonkeyPatch) -> None:
    def sample(*_: object) -> None:
        pytest.fail("something was sampled")

    patch.setattr(Rollout, "make", sample)
    patch.setattr(Rollout, "commit", sample)


def refused(
    command: str, row: Row, folder: Path, shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> str:
    """Run a row; return the one line it must end with, having touched nothing."""
    (folder / "good.txt").write_text(MORE)
    options = row.build(folder, shelf)
    options = [str(shelf.folder / "other.safetensors") if o == "MODEL" else o for o in options]
    if not row.bare:
        options = ["--steps", "good.txt", *SIZE, *options]
    before = contents(folder, shelf.folder)
    capsys.readouterr()
    code = main([command, *options])
    printed = capsys.readouterr()
    assert code == 2, printed
    assert contents(folder, shelf.folder) == before
    assert not printed.out
    (line,) = printed.err.splitlines()
    assert line.startswith("sneakpeek: ") and line.isprintable()
    assert not re.search(r"[.!?] +[A-Z]|Traceback", line), "more than one sentence"
    return line
