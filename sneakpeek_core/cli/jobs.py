"""One video to be made: everything `generate` needs, from options or from a journal."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..assembly import Files, Parts, conditioner_for, encode_picture, load_parts
from ..frozen import FrozenCache
from ..journal import read as read_journal
from ..mp4 import probe
from ..records import settings_to_json
from ..stream import VideoStream
from ..vae.wan import WanVAE
from ..video import VideoWriter
from .options import (
    BIG_DIM,
    DTYPES,
    FULL_SIZE,
    SMALL_SIZE,
    device_of,
    refuse_with_resume,
    settings_of,
    size_of,
)
from .steps import schedule_of, start_of

FILES = ("model", "vae", "text_encoder")


@dataclass(kw_only=True)
class Job:
    """A stream, where its frames go, and what is left beside them."""

    stream: VideoStream
    vae: WanVAE
    writer: VideoWriter
    random: bool  # made from random weights
    watched: Path | None
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
    return video.with_name(video.name + ".journal")


def fresh(options: argparse.Namespace) -> Job:
    """Return a new video as the options describe it; `ValueError` for what cannot be."""
    files = _files({name: getattr(options, name) for name in FILES})
    schedule = schedule_of(options) if options.steps or not options.continue_from else None
    cache = FrozenCache.load(options.continue_from) if options.continue_from else None
    if cache and options.image:
        raise ValueError("--image and --continue-from were given; a cache goes on from its own end")
    if options.goal and schedule is None:
        raise ValueError("--goal needs the --steps it belongs to; give the file of steps")
    picture = start_of(options)
    size_of(options.size, SMALL_SIZE)
    _check_folders(options)
    device = device_of(options.device)

    parts = load_parts(files, device=device, dtype=DTYPES.get(options.dtype))
    settings = settings_of(
        options, parts.preset, goals=bool(options.goal), base=cache.settings if cache else None
    )
    default = FULL_SIZE if parts.config.dim >= BIG_DIM else SMALL_SIZE
    size = size_of(options.size, cache.size if cache else default)
    fps = options.fps or (cache.fps if cache else parts.preset.fps)
    writer = _writer(options.out, size, fps, options.codec, options.crf, options.overwrite)
    conditioner = conditioner_for(parts, fps, size, options.negative)
    if cache:
        if size != cache.size:
            raise ValueError(
                f"size {options.size} is not the cache's {cache.size[0]}x{cache.size[1]}; "
                "leave it out"
            )
        stream = VideoStream.continue_from(cache, parts.model, conditioner, settings, schedule)
    else:
        assert schedule is not None
        start = encode_picture(parts.vae, picture, size) if picture is not None else None
        stream = VideoStream(
            parts.model, conditioner, schedule, settings,
            width=size[0], height=size[1], start=start,
        )  # fmt: skip
    stream.keep_journal(journal_of(writer.path), _origin(options))
    return _job(stream, parts, writer, files, options)


def resumed(options: argparse.Namespace) -> Job:
    """Return the video that a journal describes; options name files that have moved."""
    refuse_with_resume(options)
    video = Path(options.resume)
    journal = journal_of(video)
    origin = read_journal(journal)[0][0].header.get("origin")
    if not isinstance(origin, dict) or not all(isinstance(key, str) for key in origin):
        raise ValueError(f"journal {journal} does not say where its files lie; begin anew")
    for name, value in origin.items():
        if getattr(options, name, None) in (None, False, "auto") or name in ("codec", "crf"):
            setattr(options, name, _from_json(name, value))
    files = _files({name: getattr(options, name) for name in FILES})
    _check_folders(options)
    parts = load_parts(files, device=device_of(options.device), dtype=DTYPES.get(options.dtype))
    cache = FrozenCache.load(options.continue_from) if options.continue_from else None
    conditioner = conditioner_for(parts, parts.preset.fps, SMALL_SIZE, None)
    stream = VideoStream.resume(journal, parts.model, conditioner, cache)
    size = (stream.width, stream.height)
    try:
        writer = _writer(video, size, conditioner.fps, options.codec, options.crf, True)
    except BaseException:
        stream.close_journal()
        raise
    job = _job(stream, parts, writer, files, options)
    job.resumes = True
    return job


def _job(
    stream: VideoStream, parts: Parts, writer: VideoWriter, files: Files,
    options: argparse.Namespace,
) -> Job:  # fmt: skip
    return Job(
        stream=stream,
        vae=parts.vae,
        writer=writer,
        random=files.random,
        watched=options.steps if options.watch else None,
        contact_sheet=options.contact_sheet,
        save_cache=options.save_cache,
    )


def _writer(
    out: Path, size: tuple[int, int], fps: float, codec: str, crf: int | None, overwrite: bool
) -> VideoWriter:
    return VideoWriter(
        out, width=size[0], height=size[1], fps=fps, codec=codec, crf=crf, overwrite=overwrite
    )


def _files(paths: Mapping[str, Path | None]) -> Files:
    return Files(**{name: paths[name] for name in FILES})


ORIGIN = (
    *FILES, "steps", "device", "dtype", "codec", "crf", "contact_sheet", "save_cache",
    "continue_from", "watch",
)  # fmt: skip


def _origin(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that a resumed run needs again, as JSON; paths are made absolute."""
    values = {name: getattr(options, name) for name in ORIGIN}
    return {
        name: str(value.absolute()) if isinstance(value, Path) else value
        for name, value in values.items()
    }


_PATHS = {*FILES, "steps", "contact_sheet", "save_cache", "continue_from"}


def _from_json(name: str, value: Any) -> Any:
    return Path(value) if name in _PATHS and isinstance(value, str) else value


def _check_folders(options: argparse.Namespace) -> None:
    for name in ("save_cache", "contact_sheet"):
        path = getattr(options, name)
        if path is not None and (not path.absolute().parent.is_dir() or path.is_dir()):
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} {path} is not a file in a folder that exists; make the folder"
            )


def _frames_in(video: Path) -> int:
    try:
        return probe(video).frames
    except ValueError:
        return 0
