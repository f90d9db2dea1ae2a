"""Values as bytes: a JSON header and tensors in one safetensors block, never a pickle.

Cache files are one such block, journals a row of them. What is read back is not trusted: a block
that is damaged or of another kind is a `ValueError`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .conditioning import Conditioner, Conditioning
from .guidance import FutureGuidance
from .policy import CachePolicy
from .schedule import Schedule, Step, is_whole
from .settings import SamplerSettings

KIND = "sneakpeek.kind"
HEADER = "sneakpeek"
MAX_SIDE = 8192  # pixels
# What a header or tensors that are not as they should be can raise while they are taken apart.
DAMAGED = (ArithmeticError, AttributeError, LookupError, TypeError, RuntimeError, ValueError)


class Record(NamedTuple):
    """One block: what it is, its header and its tensors."""

    kind: str
    header: dict[str, Any]
    tensors: dict[str, Tensor]


def metadata_of(record: Record) -> dict[str, str]:
    """Return the safetensors metadata of a record."""
    return {KIND: record.kind, HEADER: json.dumps(record.header)}


def to_bytes(record: Record) -> bytes:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in record.tensors.items()}
    return save(tensors, metadata=metadata_of(record))


def from_bytes(data: bytes) -> Record:
    """Read one block; `ValueError` when it is damaged or none of ours."""
    try:
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
        return record_of(metadata, load(data))
    except (ValueError, SafetensorError, AttributeError, RecursionError) as error:
        raise ValueError(f"the block is damaged ({error})") from error


def record_of(metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> Record:
    """Return the record that file metadata and tensors make; `ValueError` if they are not ours."""
    if KIND not in metadata or HEADER not in metadata:
        raise ValueError("it was not written by SneakPeek")
    try:
        header = json.loads(metadata[HEADER])
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    return Record(metadata[KIND], header, tensors)


# -- settings --------------------------------------------------------------------------------------


def settings_to_json(settings: SamplerSettings) -> dict[str, Any]:
    return asdict(settings)


def settings_from_json(values: Mapping[str, Any]) -> SamplerSettings:
    """Rebuild settings; `ValueError` for unknown or impossible ones."""
    try:
        fields = dict(values)
        fields["policy"] = CachePolicy(**fields["policy"])
        if fields["guidance"] is not None:
            fields["guidance"] = FutureGuidance(**fields["guidance"])
        for name in ("sigmas", "first_sigmas", "seeds"):
            if fields[name] is not None:
                fields[name] = tuple(fields[name])
        return SamplerSettings(**fields)
    except (TypeError, KeyError) as error:
        raise ValueError(f"its settings are damaged ({error})") from error


def size_from_json(value: Any) -> tuple[int, int]:
    """Return width and height in pixels; `ValueError` if the value is anything else."""
    if not isinstance(value, list) or len(value) != 2 or not all(map(is_whole, value)):
        raise ValueError(f"its size is {value!r:.60}")
    width, height = value
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise ValueError(f"its size is {width}x{height}, not 1 to {MAX_SIDE} pixels a side")
    return width, height


def string_from_json(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.60} is no text")
    return value


# -- schedules -------------------------------------------------------------------------------------


def schedule_to_record(conditioning: Conditioning) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a schedule with its embeddings and goals, so that no encoder is needed to go on.

    A tensor that steps share is stored once, under the first of them, and shared again when it is
    read: neighbouring frames with one text are one run, which rounds differently from two.
    """
    steps, tensors = [], {}
    for index, step in enumerate(conditioning.schedule.steps):
        text, goal = conditioning.texts[index], conditioning.goals[index]
        text_in, goal_in = _first(conditioning.texts, text), _first(conditioning.goals, goal)
        steps.append(
            {
                "text": step.text, "seconds": step.seconds, "own_embeds": step.embeds is not None,
                "text_in": text_in, "goal_in": goal_in,
            }
        )  # fmt: skip
        # safetensors refuses tensors that share memory, as slices may.
        tensors.setdefault(f"text.{text_in}", text.clone())
        if goal is not None:
            tensors.setdefault(f"goal.{goal_in}", goal.clone())
    if conditioning.negative is not None:
        tensors["negative"] = conditioning.negative
    header = {
        "base": conditioning.schedule.base,
        "steps": steps,
        "version": conditioning.version,
    }
    return header, tensors


def _first(tensors: Sequence[Tensor | None], wanted: Tensor | None) -> int:
    return next(index for index, tensor in enumerate(tensors) if tensor is wanted)


def schedule_from_record(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor], conditioner: Conditioner
) -> Schedule:
    """Return the schedule; its embeddings become known to `conditioner`."""
    try:
        steps, texts = [], []
        for step in header["steps"]:
            texts.append(tensors[f"text.{step['text_in']}"])
            goal = tensors.get(f"goal.{step['goal_in']}")
            own = texts[-1] if step["own_embeds"] else None
            text, seconds = string_from_json(step["text"]), float(step["seconds"])
            steps.append(Step(text=text, seconds=seconds, embeds=own, goal=goal))
        schedule = Schedule(tuple(steps), string_from_json(header["base"]))
        if not is_whole(header["version"]):
            raise ValueError(f"version {header['version']!r:.60}")
    except DAMAGED as error:
        raise ValueError(f"its schedule is damaged ({error})") from error
    for index, step in enumerate(schedule.steps):
        if step.embeds is None:
            conditioner.known.setdefault(schedule.prompt(index), texts[index])
    return schedule
