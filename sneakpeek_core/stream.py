"""A generation as a value that can be pulled from: again, from several places, after an interrupt.

`VideoStream` describes a video (model, schedule, start, settings, seed) and remembers the latents
it has made. Whoever pulls gets remembered chunks first and new ones after; nothing is sampled
twice. The context pass of a chunk runs when the next one is asked for, so latents leave before it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache import CacheSpec, KVCache
from .conditioning import Conditioner, Conditioning
from .denoiser import Denoiser
from .edits import Edit
from .frozen import WARM_LATENTS, FrozenCache, continued_schedule, newest, on_cpu
from .journal import Journal
from .latent_store import LatentStore
from .model.config import HEAD_DIM
from .records import (
    Record,
    schedule_from_record,
    schedule_to_record,
    settings_from_json,
    settings_to_json,
)
from .sampler import Rollout
from .schedule import Schedule, Timeline, check_edit
from .settings import SamplerSettings
from .shapes import LATENT_CHANNELS, PATCH, SPATIAL, TEMPORAL, check_size

CPU = torch.device("cpu")
START, CHUNK, EDIT = "journal-start", "journal-chunk", "journal-edit"


class GenerationError(RuntimeError):
    """Sampling failed in a way that another attempt would not mend (NaN)."""


class Chunk(NamedTuple):
    """Latents that belong together, as they leave the stream."""

    number: int  # within this stream, from 0
    first: int  # latent frame of the video
    latents_BCFHW: Tensor  # float32, CPU, model space
    step: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Model:
    """A denoiser and the fingerprint of its weights and patches, on one device."""

    denoiser: Denoiser
    fingerprint: str
    device: torch.device = CPU


class VideoStream:
    """See the module. Everything is checked here, before any sampling: `ValueError` in words.

    `start` are clean latents [B, C, F, H, W] of a start image or clip, `width` and `height` pixels.
    Use `continue_from` for a cache and `resume` for a journal.
    """

    def __init__(
        self,
        model: Model,
        conditioner: Conditioner,
        schedule: Schedule,
        settings: SamplerSettings,
        *,
        width: int,
        height: int,
        start: Tensor | None = None,
        cache: FrozenCache | None = None,
        version: int = 0,
    ):
        check_size(width, height)
        if start is not None:
            _check_start(start, len(settings.seeds), width, height)
            if settings.policy.sink < 1:  # a start image is never evicted
                settings = replace(settings, policy=replace(settings.policy, sink=1))
        if cache is not None:
            _meet(conditioner, cache)
            cache.check(
                fingerprint=model.fingerprint, size=(width, height), fps=conditioner.fps,
                settings=settings,
            )  # fmt: skip
            layers, heads = cache.keys[0].shape[0], cache.keys[0].shape[4]
            if (layers, heads * HEAD_DIM) != (model.denoiser.layers, model.denoiser.dim):
                raise ValueError(
                    f"the cache holds {layers} layers of {heads} heads, which is not this model; "
                    "start anew"
                )
        if settings.cfg > 1 and conditioner.negative is None:
            raise ValueError(f"cfg {settings.cfg:g} needs a negative text; give one, or use cfg 1")
        conditioning = conditioner.prepare(schedule, version)
        settings.check_length(conditioning.timeline.latent_frames)

        self.model = model
        self.conditioner = conditioner
        self.settings = settings
        self.width, self.height = width, height
        self.before_pass: Callable[[], None] = lambda: None
        self.landed: list[dict[str, Any]] = []  # edits that took effect, as they are recorded
        self._cache = cache
        self._base = cache.chunk if cache else 0  # chunks before this stream's own
        self._first = self._made = cache.frontier if cache else 0  # latent frames likewise
        self._latents = LatentStore()
        self._firsts: list[int] = []
        # (first chunk made under it, conditioning)
        self._versions: list[tuple[int, Conditioning]] = [(0, conditioning)]
        self._edits: deque[Edit] = deque()
        self._rollout: Rollout | None = None
        self._replan_at = -1  # in a replay: the chunk before which keyframes are planned
        self._journal: Journal | None = None
        self._lock = threading.RLock()
        for part in start_chunks(start, settings.chunk) if start is not None else ():
            self._remember(part)

    @classmethod
    def continue_from(
        cls,
        cache: FrozenCache,
        model: Model,
        conditioner: Conditioner,
        settings: SamplerSettings,
        more: Schedule | None = None,
    ) -> VideoStream:
        """Go on from a cache: with its own steps, or with `more` behind them."""
        schedule = continued_schedule(cache, more)
        width, height = cache.size
        version = cache.conditioning.version + (more is not None)
        return cls(
            model, conditioner, schedule, settings,
            width=width, height=height, cache=cache, version=version,
        )  # fmt: skip

    # -- what it is ------------------------------------------------------------------------------

    @property
    def conditioning(self) -> Conditioning:
        """The schedule in force, with its embeddings."""
        return self._versions[-1][1]

    @property
    def schedule(self) -> Schedule:
        return self.conditioning.schedule

    @property
    def timeline(self) -> Timeline:
        return self.conditioning.timeline

    @property
    def made(self) -> int:
        """Latent frames the video has so far, those before a continued cache included."""
        return self._made

    @property
    def first(self) -> int:
        """The latent frame of the video that this stream begins with (0 unless continued)."""
        return self._first

    @property
    def warm(self) -> Tensor | None:
        """Latents in front of the first chunk, to warm a decoder with; None for a new video."""
        return self._cache.warm if self._cache else None

    @property
    def rollout(self) -> Rollout | None:
        """The sampler's state, once something has been sampled."""
        return self._rollout

    @property
    def cache_spec(self) -> CacheSpec:
        """Sizes of each cache (there are two with cfg above 1), for the schedule in force."""
        policy, chunk = self.settings.policy, self.settings.chunk
        return CacheSpec(
            layers=self.model.denoiser.layers,
            heads=self.model.denoiser.dim // HEAD_DIM,
            head_dim=HEAD_DIM,
            rows=self.height // (SPATIAL * PATCH),
            columns=self.width // (SPATIAL * PATCH),
            # The last chunk is sampled whole and trimmed after.
            past=policy.capacity(self.timeline.latent_frames + chunk - 1),
            future=self.settings.keyframes,
            batch=len(self.settings.seeds),
            dtype=self.model.denoiser.dtype,
        )

    # -- pulling ---------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Chunk]:
        """Yield every chunk from the first: remembered ones, then new ones."""
        index = 0
        while (chunk := self.chunk(index)) is not None:
            yield chunk
            index += 1

    def __len__(self) -> int:
        """Chunks remembered so far."""
        return len(self._latents)

    def chunk(self, index: int) -> Chunk | None:
        """Return a chunk, sampling up to it where needed; None behind the end.

        Safe to call from several threads, and again after any exception.
        """
        with self._lock:
            while len(self._latents) <= index:
                if not self._advance():
                    return None
            first = self._firsts[index]
            conditioning = self._conditioning_at(index)
            step = conditioning.timeline.step_of(first)
            text = conditioning.schedule.steps[step].text
            return Chunk(index, first, self._latents[index], step, text)

    @torch.no_grad()
    def freeze(self) -> FrozenCache:
        """Return the cache as a value at the present chunk boundary."""
        with self._lock:
            rollout = self._caught_up()
            parts = [cache.contents() for cache in rollout.caches]
            count = len(self._latents)
            own = [self._latents[i] for i in range(max(0, count - WARM_LATENTS), count)]
            known = [self.warm, *own] if self.warm is not None else own
            return FrozenCache(
                fingerprint=self.model.fingerprint,
                size=(self.width, self.height),
                fps=self.conditioner.fps,
                settings=self.settings,
                conditioning=self.conditioning,
                chunk=rollout.chunk,
                frontier=rollout.frontier,
                planned_at=rollout.planned_at,
                frames=rollout.caches[0].frames,
                future=rollout.caches[0].future,
                keys=tuple(on_cpu(keys) for keys, _ in parts),
                values=tuple(on_cpu(values) for _, values in parts),
                warm=on_cpu(newest(known)),
            )

    # -- editing ---------------------------------------------------------------------------------

    def edit(self, schedule: Schedule) -> Edit:
        """Propose a schedule from any thread; it takes effect at the next chunk boundary.

        Raises `ValueError` at once for what cannot be: a change to a finished step, an end that
        has passed. The stream may have moved on when the edit lands: then it is refused there.
        """
        check_edit(self.schedule, schedule, self.conditioner.fps, self._made)
        edit = Edit(schedule)
        self._edits.append(edit)
        return edit

    def _land_edits(self) -> None:
        while self._edits:
            edit = self._edits[0]
            try:
                check_edit(self.schedule, edit.schedule, self.conditioner.fps, self._made)
                version = self.conditioning.version + 1
                conditioning = self.conditioner.prepare(edit.schedule, version)
                self.settings.check_length(conditioning.timeline.latent_frames)
            except ValueError as error:
                self._edits.popleft()
                edit.settle("refused", self._made, str(error))
                continue
            if self._journal:
                self._journal.append(_edit_record(conditioning))
            self._put_in_force(conditioning)
            self._edits.popleft()
            edit.settle("landed", self._made)

    def _put_in_force(self, conditioning: Conditioning) -> None:
        self._versions.append((len(self._latents), conditioning))
        self.landed.append(
            {
                "latent_frame": self._made,
                "seconds": max(0, self._made - 1) * TEMPORAL / self.conditioner.fps,
                "steps": conditioning.schedule.to_text(),
            }
        )

    def _conditioning_at(self, index: int) -> Conditioning:
        """The conditioning a chunk of this stream was made under."""
        return next(c for first, c in reversed(self._versions) if first <= index)

    # -- sampling --------------------------------------------------------------------------------

    @torch.no_grad()
    def _advance(self) -> bool:
        """Make one more chunk; False when the schedule is finished."""
        self._land_edits()
        left = self.timeline.latent_frames - self._made
        if left <= 0:
            return False
        rollout = self._caught_up()
        latents = rollout.make(self.conditioning)[:, :, :left].cpu()
        if not torch.isfinite(latents).all():
            seconds = max(0, self._made - 1) * TEMPORAL / self.conditioner.fps
            raise GenerationError(
                f"the model gave NaN or infinity at {seconds:g} s; what was made before is kept: "
                "go on with another dtype (fp32), seed or cfg"
            )
        if self._journal:
            self._journal.append(_chunk_record(latents, self._planned_at()))
        self._remember(latents)
        return True

    def _remember(self, latents: Tensor) -> None:
        self._firsts.append(self._made)
        self._latents.append(latents)
        self._made += latents.shape[2]

    def _caught_up(self) -> Rollout:
        """Return the rollout with the context passes of all remembered chunks behind it.

        One is due after every chunk; all are after a start or in a fresh process.
        """
        rollout = self._rollout = self._rollout or self._new_rollout()
        rollout.before_pass = lambda: self.before_pass()
        for cache in rollout.caches:
            cache.grow(self.cache_spec.past)
        while (index := rollout.chunk - self._base) < len(self._latents):
            conditioning = self._conditioning_at(index)
            if rollout.chunk == self._replan_at:
                rollout.replan(conditioning)
                self._replan_at = -1
            rollout.commit(self._latents[index], conditioning)
        return rollout

    def _new_rollout(self) -> Rollout:
        branches = 2 if self.settings.cfg > 1 else 1
        caches = [KVCache(self.cache_spec, self.model.device) for _ in range(branches)]
        size = (self.height // SPATIAL, self.width // SPATIAL)
        rollout = Rollout(self.model.denoiser, caches, self.settings, size)
        frozen = self._cache
        if frozen is None:
            return rollout
        future = frozen.future if frozen.settings.guidance == self.settings.guidance else ()
        skip = len(frozen.future) - len(future)
        for cache, keys, values in zip(caches, frozen.keys, frozen.values, strict=True):
            cache.fill(frozen.frames, future, keys[:, :, skip:], values[:, :, skip:])
        rollout.chunk, rollout.frontier = frozen.chunk, frozen.frontier
        rollout.planned_at = frozen.planned_at
        return rollout

    # -- journal ---------------------------------------------------------------------------------

    def keep_journal(self, path: str | Path, origin: Mapping[str, Any] | None = None) -> None:
        """Write a journal from now on. `origin` (JSON) is for whoever resumes: where files lie."""
        with self._lock:
            first, *edits = self._versions
            schedule, tensors = schedule_to_record(first[1])
            header = {
                "fingerprint": self.model.fingerprint,
                "size": [self.width, self.height],
                "fps": self.conditioner.fps,
                "settings": settings_to_json(self.settings),
                "schedule": schedule,
                "cache": self._cache.content_id if self._cache else None,
                "origin": dict(origin or {}),
            }
            journal = Journal.create(path, Record(START, header, tensors))
            for index, latents in enumerate(self._latents):
                for _, conditioning in (v for v in edits if v[0] == index):
                    journal.append(_edit_record(conditioning))
                last = index + 1 == len(self._latents)
                journal.append(_chunk_record(latents, self._planned_at() if last else -1))
            self._journal = journal

    def close_journal(self) -> None:
        """Stop writing the journal; the file stays."""
        with self._lock:
            if self._journal:
                self._journal.close()
            self._journal = None

    @classmethod
    def resume(
        cls,
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
            stream = cls._from_start(path, start, model, conditioner, cache)
            for record in rest:
                stream._replay(record)
        except (KeyError, TypeError) as error:
            journal.close()
            raise ValueError(f"journal {path} is damaged ({error}); begin anew") from error
        except BaseException:
            journal.close()
            raise
        stream._journal = journal
        return stream

    @classmethod
    def _from_start(
        cls, path: str | Path, start: Record, model: Model, conditioner: Conditioner,
        cache: FrozenCache | None,
    ) -> VideoStream:  # fmt: skip
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
        return cls(
            model, conditioner, schedule, settings_from_json(header["settings"]),
            width=width, height=height, cache=cache, version=header["schedule"]["version"],
        )  # fmt: skip

    def _replay(self, record: Record) -> None:
        if record.kind == CHUNK:
            self._remember(record.tensors["latents"])
            self._replan_at = record.header["planned_at"]
        elif record.kind == EDIT:
            header = record.header["schedule"]
            schedule = schedule_from_record(header, record.tensors, self.conditioner)
            self._put_in_force(self.conditioner.prepare(schedule, header["version"]))

    def _planned_at(self) -> int:
        rollout = self._rollout
        return rollout.planned_at if rollout and rollout.caches[0].future else -1


def start_chunks(latents_BCFHW: Tensor, chunk: int) -> list[Tensor]:
    """Split given latents into the pieces that get a context pass each.

    Whole chunks where they fit (Self-Forcing's video extension), else the first latent frame, an
    image, is a chunk of its own.
    """
    alone = latents_BCFHW.shape[2] % chunk
    if alone == 0:
        return list(latents_BCFHW.split(chunk, dim=2))
    image, rest = latents_BCFHW[:, :, :1], latents_BCFHW[:, :, 1:]
    return [image, *(rest.split(chunk, dim=2) if rest.shape[2] else ())]


def _check_start(start: Tensor, batch: int, width: int, height: int) -> None:
    expected = (batch, LATENT_CHANNELS, start.shape[2], height // SPATIAL, width // SPATIAL)
    if start.shape != expected:
        raise ValueError(
            f"the start's latents are {tuple(start.shape)}, not {expected}; resize the start to "
            f"{width}x{height}"
        )


def _meet(conditioner: Conditioner, cache: FrozenCache) -> None:
    """Let the conditioner know the embeddings that the cache brings along."""
    brought = cache.conditioning
    for index, step in enumerate(brought.schedule.steps):
        if step.embeds is None:
            conditioner.known.setdefault(brought.schedule.prompt(index), brought.texts[index])
    if conditioner.negative is None:
        conditioner.negative = brought.negative


def _chunk_record(latents: Tensor, planned_at: int) -> Record:
    return Record(CHUNK, {"planned_at": planned_at}, {"latents": latents})


def _edit_record(conditioning: Conditioning) -> Record:
    schedule, tensors = schedule_to_record(conditioning)
    return Record(EDIT, {"schedule": schedule}, tensors)
