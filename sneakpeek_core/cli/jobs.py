"""One video to be made: everything `generate` needs, from options or from a journal."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..assembly import Parts, conditioner_for, encode_picture, load_parts
from ..estimate import check_cache_fits, free_bytes
from ..frozen import FrozenCache
from ..journal import first_record
from ..mp4 import probe
from ..recording import keep_journal, resume
from ..records import settings_to_json
from ..schedule import Schedule
from ..stream import VideoStream
from ..vae.wan import WanVAE
from ..video import VideoWriter
from .options import CODEC, DTYPES, OUT, SMALL_SIZE, device_of, refuse_with_resume
from .order import FILES, files_of, order_of

JOURNAL = ".journal"


@dataclass(kw_only=True)
class Job:
    """A stream, where its frames go, and what is left beside them."""

    stream: VideoStream
    vae: WanVAE
    writer: VideoWriter
    watched: Path | None
    before: Schedule | None  # the steps of a continued cache, which the watched file lacks
    contact_sheet: Path | None
    save_cache: Path | None
    resumes: bool = False

    @property
    def journal(self) -> Path:
        return journal_of(self.writer.path)

    def metadata(self) -> dict[str, str]:
        """Return what goes into the file's tags: enough to know how it was made."""
        stream = self.stream
        facts = {
            "version": __version__,
            "weights": stream.model.fingerprint,
            "settings": settings_to_json(stream.settings),
            "steps": stream.schedule.to_text(),
            "edits": stream.landed,
        }
        return {"sneakpeek": json.dumps(facts)}

    @contextlib.contextmanager
    def replacing(self) -> Iterator[None]:
        """Keep the file of a stopped video until the resumed one has caught up with it."""
        path, kept = self.writer.path, self.writer.path.with_suffix(".stopped.mp4")
        if not (self.resumes and path.exists()):
            yield
            return
        frames = _frames_in(path)
        os.replace(path, kept)
        try:
            yield
        finally:
            if self.writer.frames < frames:
                os.replace(kept, path)
            kept.unlink(missing_ok=True)


def journal_of(video: Path) -> Path:
    """Return where the journal of a video lies: beside it, under its name."""
    return video.with_name(video.name + JOURNAL)


def fresh(options: argparse.Namespace) -> Job:
    """Return a new video as the options describe it; `ValueError` for what cannot be."""
    _check_outputs(options)
    order = order_of(options)
    if not order.files.text_encoder and not order.cache:
        raise ValueError(
            "--text-encoder is missing: the texts of the steps must be encoded; give the model's"
        )
    writer = _writer(options, order.size, order.fps)
    check_cache_fits(order.plan, free_bytes(order.device))

    parts = load_parts(order.files, device=order.device, dtype=order.dtype)
    conditioner = conditioner_for(parts, order.fps, order.size, options.negative)
    if order.cache:
        stream = VideoStream.continue_from(
            order.cache, parts.model, conditioner, order.settings, order.schedule
        )
    else:
        assert order.schedule is not None
        start = None
        if order.start is not None:
            start = encode_picture(parts.vae, order.start, order.size)
        stream = VideoStream(
            parts.model, conditioner, order.schedule, order.settings,
            width=order.size[0], height=order.size[1], start=start,
        )  # fmt: skip
    keep_journal(stream, journal_of(writer.path), _origin(options))
    return _job(stream, parts, writer, order.cache, options)


def resumed(options: argparse.Namespace) -> Job:
    """Return the video that a journal describes; options name files that have moved."""
    refuse_with_resume(options)
    video = options.resume
    if video.suffix == JOURNAL:
        video = video.with_suffix("")
    journal = journal_of(video)
    _take_over(options, first_record(journal).header.get("origin"), journal)
    options.out, options.overwrite = video, True
    _check_outputs(options)
    parts = load_parts(
        files_of(options), device=device_of(options.device), dtype=DTYPES.get(options.dtype)
    )
    cache = FrozenCache.load(options.continue_from) if options.continue_from else None
    conditioner = conditioner_for(parts, parts.preset.fps, SMALL_SIZE, None)
    stream = resume(journal, parts.model, conditioner, cache)
    try:
        writer = _writer(options, (stream.width, stream.height), stream.conditioner.fps)
    except BaseException:
        stream.close()
        raise
    job = _job(stream, parts, writer, cache, options)
    job.resumes = True
    return job


def _job(
    stream: VideoStream, parts: Parts, writer: VideoWriter, cache: FrozenCache | None,
    options: argparse.Namespace,
) -> Job:  # fmt: skip
    return Job(
        stream=stream,
        vae=parts.vae,
        writer=writer,
        watched=options.steps if options.watch else None,
        before=cache.conditioning.schedule if cache else None,
        contact_sheet=options.contact_sheet,
        save_cache=options.save_cache,
    )


def _writer(options: argparse.Namespace, size: tuple[int, int], fps: float) -> VideoWriter:
    return VideoWriter(
        options.out or OUT,
        width=size[0],
        height=size[1],
        fps=fps,
        codec=options.codec or CODEC,
        crf=options.crf,
        overwrite=options.overwrite,
    )


_PATHS = (*FILES, "steps", "contact_sheet", "save_cache", "continue_from")
_WORDS = ("device", "dtype", "codec")


def _origin(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that a resumed run needs again, as JSON; paths are made absolute."""
    paths = {name: getattr(options, name) for name in _PATHS}
    others = {name: getattr(options, name) for name in (*_WORDS, "crf", "watch")}
    return {n: p if p is None else str(p.absolute()) for n, p in paths.items()} | others


def _take_over(options: argparse.Namespace, origin: object, journal: Path) -> None:
    """Fill options that were not given with a journal's; `ValueError` if it is damaged."""
    if not isinstance(origin, dict):
        raise ValueError(f"journal {journal} does not say where its files lie; begin anew")
    for name in (*_PATHS, *_WORDS, "crf", "watch"):
        value = origin.get(name)
        kind = {"crf": int, "watch": bool}.get(name, str)
        if not isinstance(value, (kind, type(None))):
            raise ValueError(f"journal {journal} is damaged ({name} {value!r}); begin anew")
        if value is not None and getattr(options, name) in (None, False, "auto"):
            setattr(options, name, Path(value) if name in _PATHS else value)


def _check_outputs(options: argparse.Namespace) -> None:
    """Raise `ValueError` unless every file asked for can be put where it should lie."""
    out = options.out or OUT
    if out.is_file() and not options.overwrite:
        go_on = f", or go on with it (--resume {out})" if journal_of(out).is_file() else ""
        raise ValueError(f"{out} exists; choose another --out, or add --overwrite{go_on}")
    taken = {out.absolute(): "--out", journal_of(out.absolute()): "the journal of --out"}
    if options.continue_from:
        taken[options.continue_from.absolute()] = "--continue-from"
    for name in ("save_cache", "contact_sheet"):
        path, flag = getattr(options, name), "--" + name.replace("_", "-")
        if path is None:
            continue
        if not path.absolute().parent.is_dir() or path.is_dir():
            raise ValueError(
                f"{flag} {path} is not a file in a folder that exists; make the folder"
            )
        if path.absolute() in taken:
            raise ValueError(f"{flag} {path} is {taken[path.absolute()]} too; choose another name")
        if name == "contact_sheet" and path.suffix.lower() != ".png":
            raise ValueError(
                f"{flag} {path} does not end in .png; use {path.with_suffix('.png').name}"
            )
        taken[path.absolute()] = flag


def _frames_in(video: Path) -> int:
    try:
        return probe(video).frames
    except ValueError:
        return 0
