"""Videos as latents on disk, encoded once: what stage 1 trains on.

A folder holds one safetensors file per clip, under a name that stands for all that the clip is made
of, and one with every sentence's embedding; `about.json` says which VAE made them. A folder made by
another VAE is refused, and so is one whose sentences the text encoder embeds differently by now.
Nothing is there by halves: a clip's file appears when it is whole, so encoding goes on where it was
stopped.

Legend: C channels, F latent frames, H, W latent cells; K steps; L tokens, D text width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..shapes import frames_of
from ..vae.streaming import encode_image, encode_video
from ..vae.wan import WanVAE
from ..whole_file import whole_file

ABOUT, TEXTS = "about.json", "texts.safetensors"
AT_ONCE = 2**18  # pixels of the pictures that are encoded side by side
SAME_TEXT = 0.1  # relative difference of embeddings that precision and device can make
IN_MEMORY = 4 << 30  # bytes of latents that are kept; larger sets are read as they are asked for


@dataclass(frozen=True)
class Clip:
    """A video to be encoded: frames FHWC uint8, and (sentence, latent frames) of each step.

    The first latent frame (one picture) belongs to no step; the steps cover the others.
    """

    frames_FHWC: Tensor
    steps: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        latent_frames = 1 + sum(count for _, count in self.steps)
        if len(self.frames_FHWC) != frames_of(latent_frames):
            raise ValueError(
                f"{len(self.frames_FHWC)} frames are not the {frames_of(latent_frames)} of "
                f"{latent_frames} latent frames"
            )


@dataclass(frozen=True)
class Sample:
    """An encoded video: `latents` CFHW, `ends` KCHW (each step's last picture encoded alone)."""

    latents: Tensor
    ends: Tensor
    steps: tuple[tuple[str, int], ...]


def encode_clips(
    names: Sequence[str],
    clip_at: Callable[[int], Clip],
    vae: WanVAE,
    encode_texts: Callable[[list[str]], list[Tensor]],
    folder: Path,
    *,
    about: dict[str, Any],
    batch: int = 8,
    progress: Callable[[Iterable[list[int]]], Iterable[list[int]]] = lambda groups: groups,
) -> None:
    """Encode the clips that the folder does not have yet under their names.

    `about` says what makes the latents (the VAE's fingerprint): `ValueError` if the folder was made
    by something else, or if `encode_texts` does not embed its sentences as they are kept. Clips of
    one length and size are encoded up to `batch` at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_about(folder, about)
    device = next(vae.parameters()).device
    missing = [i for i, name in enumerate(names) if not _path(folder, name).exists()]
    groups = [missing[first : first + batch] for first in range(0, len(missing), batch)]
    texts = _read_texts(folder)
    _check_texts(folder, texts, encode_texts)
    for group in progress(groups):
        clips = {index: clip_at(index) for index in group}
        new = {text for clip in clips.values() for text, _ in clip.steps} - texts.keys()
        if new:
            sentences = sorted(new)
            texts |= dict(zip(sentences, encode_texts(sentences), strict=True))
            _write(folder / TEXTS, {_key(text): embeds for text, embeds in texts.items()}, texts)
        for alike in _alike(clips):
            pixels = torch.stack([clips[index].frames_FHWC for index in alike])
            latents, ends = _encode(vae, pixels.to(device), clips[alike[0]].steps)
            for row, index in enumerate(alike):
                tensors = {"latents": latents[row], "ends": ends[row]}
                _write(_path(folder, names[index]), tensors, clips[index].steps)


class LatentSet:
    """Encoded videos of a folder, by their names. `ValueError` if one is not there."""

    def __init__(self, folder: Path, names: Sequence[str]):
        self._paths = [_path(folder, name) for name in names]
        for path in self._paths:
            if not path.exists():
                raise ValueError(f"{folder} lacks the encoded video {path.name}; encode it again")
        self._texts = _read_texts(folder)
        size = sum(path.stat().st_size for path in self._paths)
        self._kept: list[Sample] | None = None
        if size <= IN_MEMORY:
            self._kept = [_read_sample(path) for path in self._paths]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Sample:
        return self._kept[index] if self._kept is not None else _read_sample(self._paths[index])

    def text(self, sentence: str) -> Tensor:
        """Return a sentence's embedding [L, D], float32."""
        return self._texts[sentence]


def check_about(folder: Path, about: dict[str, Any]) -> None:
    """Write what makes a folder's latents, or raise `ValueError` if something else made them."""
    path = folder / ABOUT
    if path.exists():
        found = json.loads(path.read_text("utf-8"))
        for name, value in about.items():
            if found.get(name) != value:
                raise ValueError(
                    f"the latents in {folder} were made with {name} {found.get(name)!r}, not "
                    f"{value!r}; choose another folder, or delete this one"
                )
        return
    with whole_file(path) as part:
        part.write_text(json.dumps(about, indent=1) + "\n", "utf-8")


def _check_texts(
    folder: Path, texts: dict[str, Tensor], encode_texts: Callable[[list[str]], list[Tensor]]
) -> None:
    """Embed one kept sentence again: that tells another encoder, or other code of it, apart."""
    if not texts:
        return
    sentence = min(texts)
    kept, now = texts[sentence], encode_texts([sentence])[0].float().cpu()
    if kept.shape != now.shape or (now - kept).norm() > SAME_TEXT * kept.norm():
        raise ValueError(
            f"the texts in {folder} were made with another text encoder; choose another folder, or "
            "delete this one"
        )


@torch.no_grad()
def _encode(
    vae: WanVAE, pixels_BFHWC: Tensor, steps: Sequence[tuple[str, int]]
) -> tuple[Tensor, Tensor]:
    """Return latents BCFHW and step ends encoded alone BKCHW, in half precision."""
    frames = pixels_BFHWC.float() / 255
    latents = encode_video(vae, frames)
    at, alone = 1, []
    for _, count in steps:
        at += count
        alone.append(encode_image(vae, frames[:, frames_of(at) - 1])[:, :, 0])
    return latents.half().cpu(), torch.stack(alone, 1).half().cpu()


def _alike(clips: dict[int, Clip]) -> Iterator[list[int]]:
    """Yield the indices of clips that can be one batch, no more than memory is made for."""
    groups: dict[Any, list[int]] = {}
    for index, clip in clips.items():
        counts = tuple(count for _, count in clip.steps)
        groups.setdefault((clip.frames_FHWC.shape, counts), []).append(index)
    for (shape, _), indices in groups.items():
        most = max(1, AT_ONCE // (shape[1] * shape[2]))
        yield from (indices[first : first + most] for first in range(0, len(indices), most))


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _write(path: Path, tensors: dict[str, Tensor], facts: Iterable[Any]) -> None:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as part:
        save_file(whole, part, metadata={"facts": json.dumps(list(facts))})


def _facts(path: Path) -> list[Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["facts"])


def _read_texts(folder: Path) -> dict[str, Tensor]:
    path = folder / TEXTS
    if not path.exists():
        return {}
    tensors = load_file(path)
    return {text: tensors[_key(text)].float() for text in _facts(path)}


def _read_sample(path: Path) -> Sample:
    tensors = load_file(path)
    steps = tuple((text, count) for text, count in _facts(path))
    return Sample(tensors["latents"], tensors["ends"], steps)
