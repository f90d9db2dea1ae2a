"""A stream's history in a journal: written while it is made, read by a fresh process to go on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .conditioning import Conditioner, Conditioning
from .frozen import FrozenCache
from .journal import Journal
from .records import (
    Record,
    schedule_from_record,
    schedule_to_record,
    settings_from_json,
    settings_to_json,
)
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
    journal, (start, *rest) = Journal.reopen(path)
    try:
        stream = _begun(path, start, model, conditioner, cache)
        for record in rest:
            _replay(stream, record)
    except (KeyError, TypeError, AttributeError) as error:
        journal.close()
        raise ValueError(f"journal {path} is damaged ({error}); begin anew") from error
    except BaseException:
        journal.close()
        raise
    stream.attach(lambda _: JournalLog(journal))
    return stream


def _begun(
    path: str | Path,
    start: Record,
    model: Model,
    conditioner: Conditioner,
    cache: FrozenCache | None,
) -> VideoStream:
    header = start.header
    if header["fingerprint"] != model.fingerprint:
        raise ValueError(
            f"journal {path} was made with another model: its weights are "
            f"{header['fingerprint'][:8]}, these are {model.fingerprint[:8]}; load that model"
        )
    if header["cache"] != (cache.content_id if cache else None):
        raise ValueError(
            f"journal {path} goes on from a cache; give that one (--continue-from)"
            if header["cache"]
            else f"journal {path} does not go on from a cache; leave it out"
        )
    conditioner.fps = float(header["fps"])
    conditioner.negative = start.tensors.get("negative", conditioner.negative)
    schedule = schedule_from_record(header["schedule"], start.tensors, conditioner)
    width, height = header["size"]
    return VideoStream(
        model, conditioner, schedule, settings_from_json(header["settings"]),
        width=width, height=height, cache=cache, version=header["schedule"]["version"],
    )  # fmt: skip


def _replay(stream: VideoStream, record: Record) -> None:
    if record.kind == CHUNK and record.header["number"] < len(stream):
        return  # written twice: an interrupt came between writing and remembering
    if record.kind == CHUNK:
        stream.remember(record.tensors["latents"], record.header["planned_at"])
    elif record.kind == EDIT:
        header = record.header["schedule"]
        schedule = schedule_from_record(header, record.tensors, stream.conditioner)
        stream.put_in_force(stream.conditioner.prepare(schedule, header["version"]))
