"""A stream's history in a journal: written while it is made, read by a fresh process to go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .conditioning import Conditioner, Conditioning
from .frozen import FrozenCache
from .journal import Journal
from .records import (
    DAMAGED,
    Record,
    schedule_from_record,
    schedule_to_record,
    settings_from_json,
    settings_to_json,
    size_from_json,
)
from .schedule import is_whole
from .shapes import LATENT_CHANNELS, SPATIAL
from .stream import History, Model, Remembered, VideoStream

START, CHUNK, EDIT = "journal-start", "journal-chunk", "journal-edit"


class JournalLog:
    """A `StreamLog` that appends to a journal."""

    def __init__(self, journal: Journal):
        self._journal = journal

    def chunk(self, remembered: Remembered) -> None:
        header = {"number": remembered.number, "planned_at": remembered.planned_at}
        self._journal.append(Record(CHUNK, header, {"latents": remembered.latents_BCFHW}))

    def edit(self, conditioning: Conditioning) -> None:
        schedule, tensors = schedule_to_record(conditioning)
        self._journal.append(Record(EDIT, {"schedule": schedule}, tensors))

    def close(self) -> None:
        self._journal.close()


def keep_journal(
    stream: VideoStream, path: str | Path, origin: Mapping[str, Any] | None = None
) -> None:
    """Write a stream's history so far, then what is added to it, until `stream.close`.

    `origin` (JSON) is for whoever resumes: where the files lie.
    """

    def begin(history: History) -> JournalLog:
        first, *rest = history
        assert isinstance(first, Conditioning)
        schedule, tensors = schedule_to_record(first)
        header = {
            "fingerprint": stream.model.fingerprint,
            "size": [stream.width, stream.height],
            "fps": stream.conditioner.fps,
            "settings": settings_to_json(stream.settings),
            "schedule": schedule,
            "cache": stream.continued.content_id if stream.continued else None,
            "origin": dict(origin or {}),
        }
        log = JournalLog(Journal.create(path, Record(START, header, tensors)))
        for event in rest:
            if isinstance(event, Conditioning):
                log.edit(event)
            else:
                log.chunk(event)
        return log

    stream.attach(begin)


def resume(
    path: str | Path,
    model: Model,
    conditioner: Conditioner,
    cache: FrozenCache | None = None,
) -> VideoStream:
    """Go on from a journal in a fresh process, and keep writing it.

    Chunks in the journal are remembered, not sampled again; before the first new one their
    context passes are replayed. `cache` is the one the stream had continued, if any. Raises
    `ValueError` when journal, model and cache do not belong together.
    """
    journal, records = Journal.reopen(path)
    try:
        start = next(records)
        _check_belongs(path, start, model, cache)
        with _in_words(path):
            stream = _begun(start, model, conditioner, cache)
        for record in records:
            with _in_words(path):
                _replay(stream, record)
    except BaseException:
        journal.close()
        raise
    stream.attach(lambda _: JournalLog(journal))
    return stream


@contextmanager
def _in_words(path: str | Path) -> Iterator[None]:
    try:
        yield
    except DAMAGED as error:
        raise ValueError(f"journal {path} is damaged ({error}); begin anew") from error


def _check_belongs(
    path: str | Path, start: Record, model: Model, cache: FrozenCache | None
) -> None:
    """Raise `ValueError` unless the journal is of this model and of this cache."""
    fingerprint, continued = str(start.header.get("fingerprint")), start.header.get("cache")
    if fingerprint != model.fingerprint:
        raise ValueError(
            f"journal {path} was made with another model: its weights are "
            f"{fingerprint[:8]}, these are {model.fingerprint[:8]}; load that model"
        )
    if continued != (cache.content_id if cache else None):
        raise ValueError(
            f"journal {path} goes on from a cache; give that one (--continue-from)"
            if continued
            else f"journal {path} does not go on from a cache; leave it out"
        )


def _begun(
    start: Record, model: Model, conditioner: Conditioner, cache: FrozenCache | None
) -> VideoStream:
    header = start.header
    conditioner = replace(
        conditioner,
        fps=header["fps"],
        negative=start.tensors.get("negative", conditioner.negative),
        known={**conditioner.known},
    )
    schedule = schedule_from_record(header["schedule"], start.tensors, conditioner)
    width, height = size_from_json(header["size"])
    return VideoStream(
        model, conditioner, schedule, settings_from_json(header["settings"]),
        width=width, height=height, cache=cache, version=header["schedule"]["version"],
    )  # fmt: skip


def _replay(stream: VideoStream, record: Record) -> None:
    """Let a stream remember a record; whatever of `DAMAGED` it raises, the record is to blame."""
    if record.kind == CHUNK:
        number, planned_at = record.header["number"], record.header["planned_at"]
        if not is_whole(number) or not is_whole(planned_at) or not 0 <= number <= len(stream):
            raise ValueError(f"chunk {number!r:.60} comes after {len(stream)} chunks")
        if number < len(stream):
            return  # written twice: an interrupt came between writing and remembering
        latents = record.tensors["latents"]
        size = (LATENT_CHANNELS, stream.height // SPATIAL, stream.width // SPATIAL)
        batch, channels, frames, *sides = latents.shape
        fits = batch == len(stream.settings.seeds) and (channels, *sides) == size
        left = stream.timeline.latent_frames - stream.made
        if not fits or not 1 <= frames <= min(stream.settings.chunk, left):
            raise ValueError(f"the latents of chunk {number} are {tuple(latents.shape)}")
        if not latents.is_floating_point() or not torch.isfinite(latents).all():
            raise ValueError(f"the latents of chunk {number} are not all finite fractions")
        stream.remember(latents, planned_at)
    elif record.kind == EDIT:
        header = record.header["schedule"]
        schedule = schedule_from_record(header, record.tensors, stream.conditioner)
        conditioning = stream.conditioner.prepare(schedule, header["version"])
        stream.check(conditioning)
        stream.put_in_force(conditioning)
