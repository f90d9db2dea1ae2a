"""Finds the one set of weights inside a checkpoint, under the names of Wan 2.1's own files.

Trainers nest and wrap: `{"generator_ema": {"model._fsdp_wrapped_module.blocks.0...": tensor}}`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from .tensor_files import open_tensors

Value = TypeVar("Value")
NESTS = ("generator_ema", "generator", "model", "state_dict", "generator_lora")  # best first
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
PREFIXES = (
    *("model.diffusion_model.", "diffusion_model.", "net.", "module.", "model."),
    *("first_stage_model.", "vae."),
)
_WHOLE = "model.diffusion_model."  # marks a file that holds other models besides
_BESIDES = ("vae.", "first_stage_model.", "cond_stage_model.", "text_encoders.", "model_ema.")
_MAX_NESTING = 4


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by bare name, the file's metadata, the key they lay under, the wrappers removed."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    source: str = ""  # "generator_ema", "state_dict/model", or "" for a flat file
    wrappers: tuple[str, ...] = ()


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Open a weight file of any nesting; see `open_tensors` for what can go wrong."""
    tree, metadata = open_tensors(path)
    tensors, source = choose(tree)
    if not tensors:
        raise ValueError(
            f"{Path(path).name} holds no tensors at its top levels; "
            f"save its weights as a state dict under one of {', '.join(NESTS)}"
        )
    try:
        return Checkpoint(bare_names(tensors), metadata, source, wrappers_of(tensors))
    except ValueError as error:
        raise ValueError(f"{Path(path).name}: {error}") from error


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a weight file's tensors by bare name (CPU, memory-mapped) and its metadata."""
    checkpoint = read_checkpoint(path)
    return checkpoint.tensors, checkpoint.metadata


def choose(tree: Mapping[Any, Any]) -> tuple[dict[str, Tensor], str]:
    """Return the preferred state dict of a nested tree, and the path of keys to it.

    `generator_ema` wins over `generator`, `model`, `state_dict`; a level that holds nothing but
    one dict is entered whatever its name. Values that are not tensors are dropped.
    """
    keys: list[str] = []
    for _ in range(_MAX_NESTING):
        nests = {k: v for k, v in tree.items() if isinstance(v, Mapping) and v}
        named = [key for key in NESTS if key in nests]
        alone = not any(isinstance(v, Tensor) for v in tree.values()) and len(nests) == 1
        if not named and not alone:
            break
        key = named[0] if named else next(iter(nests))
        keys.append(str(key))
        tree = nests[key]
    return {str(k): v for k, v in tree.items() if isinstance(v, Tensor)}, "/".join(keys)


def bare_names(named: Mapping[str, Value]) -> dict[str, Value]:
    """Return the same values under bare names: no wrapper anywhere, no leading prefix, no `freqs`.

    A file that holds several models (`model.diffusion_model.` beside `vae.`) gives its
    transformer. `ValueError` when two names become one.
    """
    whole = any(name.startswith(_WHOLE) for name in named)
    bare: dict[str, Value] = {}
    for name, value in named.items():
        if whole and name.startswith(_BESIDES):
            continue
        short = bare_name(name)
        if short == "freqs":
            continue
        if short in bare:
            raise ValueError(f"two tensors are called {short} once wrappers are removed; keep one")
        bare[short] = value
    return bare


def bare_name(name: str) -> str:
    """Strip wrappers anywhere, then one leading prefix."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def wrappers_of(names: Iterable[str]) -> tuple[str, ...]:
    """Return the wrappers and prefixes that `bare_names` would remove."""
    found: set[str] = set()
    for name in names:
        found.update(wrapper for wrapper in WRAPPERS if wrapper in name)
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        found.update([prefix for prefix in PREFIXES if name.startswith(prefix)][:1])
    return tuple(part for part in (*WRAPPERS, *PREFIXES) if part in found)
