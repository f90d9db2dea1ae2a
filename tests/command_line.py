"""Tiny real files for tests of the command line, and the command line as tests call it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import av
import torch
from torch import Tensor

from sneakpeek_core.cli import main
from sneakpeek_core.model.initial import random_transformer, random_vae
from sneakpeek_core.model.weights import KIND, save_model
from sneakpeek_core.text_encoder import random_text_encoder, save_text_encoder
from tests.small import CONFIG, TEXT_DIM

# What the small model's own file says: two latent frames a chunk, two passes.
STATED = {"preset": "tiny", "text_len": CONFIG.text_len, "chunk": 2, "steps": 2, "window": 6}
STATED |= {"timesteps": [1000.0], "trained_span": 13}
STEPS = "base: on a table\n[0.5s] lift it\n[0.5s] put it down\n"
SIZE = ("--size", "32x32")


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
