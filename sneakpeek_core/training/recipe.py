"""Recipes: what to train, on what, for how long, as a TOML file read into frozen values.

A key that no stage knows is refused by name, so that a misspelt one is not silently a default.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..whole_file import whole_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

Value = TypeVar("Value")
LICENCE = "Apache-2.0"  # of weights trained from nothing


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """Learning rates rise linearly, stay, and fall linearly to zero at the last step."""

    matrix_lr: float = 3e-3  # Muon's: weights of two or more axes
    lr: float = 2e-3  # AdamW's: everything else
    weight_decay: float = 0.0
    momentum: float = 0.95
    clip: float = 1.0  # norm of the whole gradient
    warmup: int = 50  # steps
    fall: float = 1.0  # share of the run over which the rates go to zero
    ema: float = 0.998

    def factor(self, step: int, steps: int) -> float:
        """Return what the learning rates are multiplied with at `step` (0-based) of `steps`."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        falling = max(1.0, self.fall * steps)
        return min(rise, max(0.0, steps - step) / falling, 1.0)


@dataclass(frozen=True, kw_only=True)
class Run:
    """How long, how often something is written, and where randomness starts."""

    steps: int
    seed: int = 0
    log_every: int = 20
    save_every: int = 200
    evaluate_every: int = 500
    precision: typing.Literal["no", "bf16"] = "no"

    def __post_init__(self) -> None:
        check_counts(self, "steps", "log_every", "save_every", "evaluate_every")


def check_counts(recipe: object, *names: str) -> None:
    """Raise `ValueError` for the first of these numbers that is below 1."""
    for name in names:
        if getattr(recipe, name) < 1:
            raise ValueError(f"{name} {getattr(recipe, name)} must be 1 or more")


def check_shares(recipe: object, *names: str) -> None:
    """Raise `ValueError` for the first of these numbers that is no share (or noise level)."""
    for name in names:
        if not 0 <= getattr(recipe, name) <= 1:
            raise ValueError(f"{name} {getattr(recipe, name)} must be from 0 to 1")


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return a TOML file; `ValueError` names the file if it is not one."""
    path = Path(path)
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is not a recipe: {error}") from error


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the keys of `changes`; tables are merged, everything else is replaced."""
    table = dict(base)
    for key, value in changes.items():
        known = table.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            value = merged(known, value)
        table[key] = value
    return table


def record(path: Path, step: int, table: dict[str, Any]) -> list[str]:
    """Write down that a run follows `table` from `step` on; return the keys that changed there.

    One line of JSON for each change, so that what a run was made by can be told when it is done.
    """
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    known = [json.loads(line) for line in lines]
    before = _flat(known[-1]["recipe"]) if known else None
    now = _flat(table)
    if before == now:
        return []
    known = [one for one in known if one["from_step"] < step]
    known.append({"from_step": step, "recipe": table})
    with whole_file(path) as part:
        part.write_text("".join(json.dumps(one) + "\n" for one in known), "utf-8")
    if before is None:
        return []
    return sorted(key for key in before | now if before.get(key) != now.get(key))


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a table's values by their dotted keys, as JSON gives them back."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.loads(json.dumps(value))
    return flat


def build(kind: type[Value], table: Any, where: str = "the recipe") -> Value:
    """Return a dataclass from a TOML table, nested ones and lists of them included.

    `ValueError` names the key that is unknown, missing or of another type.
    """
    if not isinstance(table, dict):
        raise ValueError(f"{where} must be a table of keys and values, got {table!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            raise ValueError(f"{where}: key {key!r} is unknown; known: {', '.join(fields)}")
    hints = typing.get_type_hints(kind)
    values = {key: _convert(hints[key], table[key], f"{where}: {key}") for key in table}
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"{where}: key {name!r} is missing")
    return kind(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {value!r}")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise ValueError(f"{where} must have {len(kinds)} entries, got {value!r}")
        return tuple(_convert(k, v, where) for k, v in zip(kinds, value, strict=True))
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{where} {value!r} must be one of {', '.join(map(str, arguments))}")
        return value
    if origin in (typing.Union, types.UnionType):
        (hint,) = (kind for kind in arguments if kind is not type(None))
        return _convert(hint, value, where)
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} {value!r} must be of type {getattr(hint, '__name__', hint)}")
    return value


def random_for(*key: object) -> random.Random:
    """Return randomness that is a function of `key`, the same in every process and release."""
    return random.Random(hashlib.sha256(repr(key).encode()).digest())
