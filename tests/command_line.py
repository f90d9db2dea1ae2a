"""Tiny real files for tests of the command line, and the command line as tests call it."""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor

from sneakpeek_core.cli import main
from sneakpeek_core.model.initial import random_transformer, random_vae
from sneakpeek_core.model.weights import KIND, save_model
from sneakpeek_core.mp4 import probe
from sneakpeek_core.sampler import Rollout
from sneakpeek_core.stream import VideoStream
from sneakpeek_core.text_encoder import random_text_encoder, save_text_encoder
from tests.small import CONFIG, TEXT_DIM

# What the small model's own file says: two latent frames a chunk, two passes.
STATED = {"preset": "tiny", "text_len": CONFIG.text_len, "chunk": 2, "steps": 2, "window": 6}
STATED |= {"timesteps": [1000.0], "trained_span": 13}
STEPS = "base: on a table\n[0.5s] lift it\n[0.5s] put it down\n"
MORE = "[0.5s] turn it around\n[0.5s] let it go\n"
LONG = "[1s] lift it\n[1s] turn it\n[1s] put it down\n"  # 13 latent frames, 7 chunks of 2
SIZE = ("--size", "32x32")
PICTURE = Path(__file__).parent.parent / "sneakpeek_core/embedded/start.png"
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Shelf:
    """A folder with a model, its VAE and its text encoder."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model.safetensors"

    @property
    def vae(self) -> Path:
        return self.folder / "vae.safetensors"

    @property
    def text_encoder(self) -> Path:
        return self.folder / "text.safetensors"

    @property
    def options(self) -> list[str]:
        return [
            "--model", str(self.model), "--vae", str(self.vae),
            "--text-encoder", str(self.text_encoder),
        ]  # fmt: skip


def make_shelf(folder: Path) -> Shelf:
    shelf = Shelf(folder)
    save_transformer(shelf.model)
    save_model(shelf.vae, random_vae(8, 0).state_dict(), {KIND: "vae"})
    save_text_encoder(shelf.text_encoder, random_text_encoder(0, TEXT_DIM))
    return shelf


def save_transformer(path: Path, seed: int = 0, **stated) -> None:
    """Write a small model; `stated` changes what its metadata says."""
    tensors = random_transformer(CONFIG, seed).state_dict()
    save_model(path, tensors, {"sneakpeek": STATED | stated})


def generate(*arguments: object) -> int:
    return main(["generate", *map(str, arguments)])


def frames_of_file(path: Path) -> Tensor:
    """Decode a video: FHWC, uint8."""
    with av.open(str(path)) as container:
        return torch.stack(
            [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
        )


def contents(*folders: Path) -> dict[Path, bytes | None]:
    """Return every file below the folders with its bytes (folders: None)."""
    found = (path for folder in folders for path in folder.rglob("*"))
    return {path: None if path.is_dir() else path.read_bytes() for path in found}


@dataclass(frozen=True)
class Bench:
    """The working folder of a test, with a file of steps, beside a shelf of models."""

    folder: Path
    shelf: Shelf

    def write(self, name: str, text: str) -> Path:
        (self.folder / name).write_text(text)
        return self.folder / name

    def generate(self, *options: object) -> int:
        return generate(*self.shelf.options, *SIZE, *options)

    def long(self, out: str, *options: object) -> int:
        """Stream the long steps to `out`."""
        return self.generate("--steps", self.folder / "long.txt", "--out", out, *options)


def make_bench(folder: Path, shelf: Shelf) -> Bench:
    made = Bench(folder, shelf)
    for name, text in (("steps.txt", STEPS), ("more.txt", MORE), ("long.txt", LONG)):
        made.write(name, text)
    return made


def at_chunk(patch: Patch, number: int, act: Callable[[], None], times: int = 1) -> None:
    """Let `act` run when chunk `number` of a stream is about to be made."""
    make, left = Rollout.make, times

    def hooked(self: Rollout, conditioning):
        nonlocal left
        if self.chunk == number and left:
            left -= 1
            act()
        return make(self, conditioning)

    patch.setattr(Rollout, "make", hooked)


def failing(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def failing_loader(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def edited_at(patch: Patch, chunk: int, path: Path, text: str) -> None:
    """Save `text` as the steps when `chunk` begins, and wait until the stream knows of it."""
    known, edit = threading.Event(), VideoStream.edit

    def noticed(self: VideoStream, schedule):
        made = edit(self, schedule)
        known.set()
        return made

    def act() -> None:
        path.write_text(text)
        assert known.wait(20), "the change was not noticed"

    patch.setattr(VideoStream, "edit", noticed)
    at_chunk(patch, chunk, act)


def facts_of(path: Path) -> dict:
    return json.loads(probe(path).metadata["sneakpeek"])


def command_in(text: str) -> list[str]:
    """Return the arguments of the command that was printed to go on with."""
    program, *arguments = shlex.split(text.split("go on with: ")[1].splitlines()[0])
    assert program == "sneakpeek"
    return arguments


def same_video(one: Path, other: Path) -> bool:
    return torch.equal(frames_of_file(one), frames_of_file(other))
