"""`sneakpeek inspect FILE`: weights, and what SneakPeek itself leaves behind.

Headers are anyone's text: whatever does not fit is a damaged file, and no control characters reach
the terminal.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..journal import MAGIC, read
from ..model.inspect import describe
from ..model.tensor_files import read_header, sniff
from ..mp4 import probe
from ..records import HEADER, KIND, settings_from_json
from ..schedule import Schedule, Step, Timeline
from ..shapes import frames_of
from .endings import on_one_line
from .jobs import JOURNAL, journal_of

_SHOWN = 160  # characters of one line


class _Row(NamedTuple):
    name: str
    value: str


def run(options: argparse.Namespace) -> int:
    """Print what a file is and how it would be run."""
    path: Path = options.file
    rows = _rows_of(path)
    if rows is None:
        print(describe(path))
        return 0
    size = path.stat().st_size
    for name, value in (_Row("file", f"{path.name}, {size / 1e6:.2f} MB ({size:,} bytes)"), *rows):
        value = on_one_line(value)
        shown = value if len(value) <= _SHOWN else value[:_SHOWN] + " ..."
        print(f"{name:<11} {shown}")
    return 0


def _rows_of(path: Path) -> list[_Row] | None:
    """Return what one of our own files holds; None for all others."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        head = file.read(len(MAGIC))
    if head == MAGIC:
        return _whole(path, _journal)
    if head[4:8] == b"ftyp":
        return _video(path)
    try:
        ours = sniff(path) == "safetensors" and read_header(path)[1].get(KIND) == "cache"
    except ValueError:
        return None
    return _whole(path, _cache) if ours else None


def _whole(path: Path, rows: Callable[[Path], list[_Row]]) -> list[_Row]:
    try:
        return rows(path)
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is damaged ({error}); begin anew") from error


def _journal(path: Path) -> list[_Row]:
    records = read(path)
    header, edits, chunks = next(records).header, [], []
    for record in records:
        if record.kind == "journal-edit":
            edits.append(record.header["schedule"])
        elif record.kind == "journal-chunk":
            chunks.append(record.tensors["latents"].shape[2])
    schedule = _schedule(edits[-1] if edits else header["schedule"])
    video = path.with_name(path.name.removesuffix(JOURNAL))
    also = " (what it continues is not counted)" if header["cache"] else ""
    return [
        _Row("kind", f"journal: of {video.name}, which was stopped"),
        _Row("video", _video_words(header)),
        _Row("made", f"{_made(sum(chunks), header)} in {len(chunks)} chunks{also}"),
        *_schedule_rows(schedule, header["fps"], sum(chunks) if not also else None),
        _Row("edits", str(len(edits))),
        *_settings_rows(header["settings"]),
        _Row("weights", str(header["fingerprint"])),
        _Row("go on with", f"sneakpeek generate --resume {shlex.quote(str(video))}"),
    ]


def _cache(path: Path) -> list[_Row]:
    header = json.loads(read_header(path)[1][HEADER])
    schedule, made = _schedule(header["schedule"]), int(header["frontier"])
    left = Timeline.of(schedule, header["fps"]).latent_frames > made
    more = "" if left else " --steps MORE.txt"
    return [
        _Row("kind", "cache: the state of a video that can be continued"),
        _Row("video", _video_words(header)),
        _Row("made", f"{_made(made, header)} in {int(header['chunk'])} chunks"),
        *_schedule_rows(schedule, header["fps"], made),
        _Row("holds", f"{len(header['frames'])} latent frames, {len(header['future'])} keyframes"),
        *_settings_rows(header["settings"]),
        _Row("weights", str(header["fingerprint"])),
        _Row("go on with", f"sneakpeek generate --continue-from {shlex.quote(str(path))}{more}"),
    ]


def _video(path: Path) -> list[_Row]:
    facts = probe(path)
    rows = [
        _Row("kind", "video"),
        _Row(
            "video",
            f"{facts.width}x{facts.height}, {facts.fps:g} frames/s, {facts.codec}, "
            f"{facts.frames} frames, {facts.seconds:.2f} s",
        ),
    ]
    if HEADER in facts.metadata:
        rows += _tag_rows(facts.metadata[HEADER])
    if journal_of(path).is_file():
        rows += [
            _Row("journal", f"{journal_of(path).name} lies beside it: the video was stopped"),
            _Row("go on with", f"sneakpeek generate --resume {shlex.quote(str(path))}"),
        ]
    return rows


def _tag_rows(text: str) -> list[_Row]:
    try:
        facts = json.loads(text)
        return [
            _Row("made by", f"SneakPeek {facts['version']}"),
            *(_Row("  step", line) for line in str(facts["steps"]).splitlines()),
            _Row("edits", str(len(facts["edits"]))),
            *_settings_rows(facts["settings"]),
            _Row("weights", str(facts["weights"])),
        ]
    except (ValueError, KeyError, TypeError, RecursionError):
        return [_Row("made by", "a tag called sneakpeek that cannot be read")]


def _schedule(header: Mapping[str, Any]) -> Schedule:
    steps = (Step(text=str(s["text"]), seconds=float(s["seconds"])) for s in header["steps"])
    return Schedule(tuple(steps), str(header["base"]))


def _schedule_rows(schedule: Schedule, fps: float, made: int | None) -> list[_Row]:
    rows = [_Row("  step", line) for line in schedule.to_text().splitlines()]
    if made is None:
        return rows
    timeline = Timeline.of(schedule, fps)
    left = (frames_of(timeline.latent_frames) - frames_of(made)) / fps
    if left <= 0:
        return [*rows, _Row("left", "nothing: all steps are made")]
    return [*rows, _Row("left", f"{left:.2f} s, from step {timeline.step_of(made) + 1}")]


def _settings_rows(values: Mapping[str, Any]) -> list[_Row]:
    settings = settings_from_json(values)
    policy, guidance = settings.policy, settings.guidance
    sigmas = ", ".join(f"{sigma:g}" for sigma in settings.sigmas)
    return [
        _Row(
            "sampling",
            f"seed {', '.join(map(str, settings.seeds))}, chunk {settings.chunk}, "
            f"{settings.solver}, cfg {settings.cfg:g}, sigmas {sigmas}",
        ),
        _Row(
            "policy",
            f"window {policy.window or 'all'}, sink {policy.sink}, positions {policy.positions}",
        ),
        _Row("guidance", f"{guidance.mode}, {guidance.place}" if guidance else "off"),
    ]


def _video_words(header: Mapping[str, Any]) -> str:
    width, height = header["size"]
    return f"{int(width)}x{int(height)}, {float(header['fps']):g} frames/s"


def _made(latent_frames: int, header: Mapping[str, Any]) -> str:
    frames = frames_of(latent_frames)
    return f"{frames} frames, {frames / float(header['fps']):.2f} s"
