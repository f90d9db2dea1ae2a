"""Loads and saves models: a file of any wrapping in, a module with Wan 2.1's names out.

Modules are built without memory and take the file's tensors, cast one by one, so a model is never
held twice; in the file's own dtype on the CPU they stay memory-mapped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..vae.wan import WanVAE, vae_dim
from ..whole_file import whole_file
from .checkpoint import Checkpoint, read_checkpoint, read_tensors
from .config import ModelConfig
from .fingerprint import weights_fingerprint
from .initial import random_transformer, random_vae
from .presets import Preset, own_fields, preset_for
from .recognise import config_from_shapes, recognise
from .transformer import WanTransformer

__all__ = [
    "LoadedModel", "config_from_shapes", "load_transformer", "load_vae", "random_transformer",
    "random_vae", "read_tensors", "save_model", "weights_fingerprint",
]  # fmt: skip

Module = TypeVar("Module", bound=nn.Module)
KIND = "sneakpeek.kind"  # metadata key that says what a file of ours is
_LISTED = 4  # names in an error


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A transformer, ready to run, and what its file says about how to run it."""

    tree: WanTransformer  # eval mode, no gradients; training turns them on
    config: ModelConfig
    source: str  # the key its weights lay under: "generator_ema", "" for a flat file
    preset: Preset
    metadata: dict[str, str]


def load_transformer(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> LoadedModel:
    """Load a Wan 2.1 text-to-video transformer; `ValueError` in words for every other file.

    A preset that cannot be run still loads (its weights may be trained further);
    `preset.check_runnable()` refuses it.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    try:
        config = config_from_shapes(_shapes(checkpoint), text_len(checkpoint.metadata))
        preset = preset_for(path, checkpoint.metadata, config, checkpoint.source)
        with torch.device("meta"):
            tree = WanTransformer(config)
        fill(tree, checkpoint.tensors, dtype, device)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return LoadedModel(
        tree=tree,
        config=config,
        source=checkpoint.source,
        preset=preset,
        metadata=checkpoint.metadata,
    )


def load_vae(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> WanVAE:
    """Load a Wan 2.1 VAE of any base width; `ValueError` in words for every other file."""
    checkpoint = read_checkpoint(path)
    shapes = _shapes(checkpoint)
    try:
        found = recognise(shapes)
        if found.kind != "vae" or found.problem:
            fix = found.problem if found.kind == "vae" else "use wan_2.1_vae.safetensors"
            raise ValueError(f"this looks like {found.label}, not a Wan 2.1 VAE: {fix}")
        with torch.device("meta"):
            vae = WanVAE(dim=vae_dim(shapes))
        return fill(vae, checkpoint.tensors, dtype, device)
    except ValueError as error:
        raise ValueError(f"{Path(path).name}: {error}") from error


def save_model(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write named tensors to safetensors, whole or not at all.

    Metadata values that are not strings are stored as JSON. `sneakpeek.kind` says what the file
    is, `sneakpeek.preset` or the fields of a JSON dict under `sneakpeek` how to run it.
    """
    path = Path(path)
    words = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (metadata or {}).items()}
    # Cloned to the CPU because safetensors refuses tensors that share memory.
    copies = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    with whole_file(path) as part:
        save_file(copies, part, metadata=words)


def fill(
    tree: Module, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device | str
) -> Module:
    """Give a module its tensors by name, cast; takes them out of `tensors` as it goes.

    `ValueError` that lists the first missing, unexpected and misshapen names.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in tree.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = _differences(expected, found)
    whole = sorted(name for name, tensor in tensors.items() if not tensor.is_floating_point())
    if whole and not problems:
        raise ValueError(f"{_first_few('quantised', whole)}; use an fp16 or bf16 file")
    if problems:
        raise ValueError(
            f"{'; '.join(problems)}; this looks like {recognise(found).label}, but not one whole "
            "model: use the complete, unmodified file"
        )
    state = {name: tensors.pop(name).to(device=device, dtype=dtype) for name in expected}
    tree.load_state_dict(state, strict=True, assign=True)
    return tree.eval().requires_grad_(False)


def expected_names(config: ModelConfig) -> set[str]:
    """Return the tensor names of a transformer of these sizes."""
    with torch.device("meta"):
        return set(WanTransformer(config).state_dict())


def text_len(metadata: Mapping[str, str]) -> int:
    """Return the padded prompt length that a file's metadata states, else Wan's 512 tokens."""
    stated = own_fields(metadata).get("text_len", metadata.get("text_len", 512))
    try:
        tokens = int(stated)
    except (TypeError, ValueError):
        tokens = 0
    if not 1 <= tokens <= 65536:
        raise ValueError(f"text_len {stated!r} in the metadata is not 1 to 65536; Wan's is 512")
    return tokens


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}


def _differences(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[str]:
    common = expected.keys() & found.keys()
    wrong = [f"{n} {list(found[n])}, not {list(expected[n])}" for n in sorted(common)
             if expected[n] != found[n]]  # fmt: skip
    lists = (
        ("missing", sorted(expected.keys() - common)),
        ("unexpected", sorted(found.keys() - common)),
        ("of another shape", wrong),
    )
    return [_first_few(word, names) for word, names in lists if names]


def _first_few(word: str, names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{word}: {', '.join(names[:_LISTED])}{more}"
