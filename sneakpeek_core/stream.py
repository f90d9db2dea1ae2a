"""A generation as a value that can be pulled from: again, from several places, after an interrupt.

`VideoStream` describes a video (model, schedule, start, settings, seed) and remembers the latents
it has made. Whoever pulls gets remembered chunks first and new ones after; nothing is sampled
twice. The context pass of a chunk runs when the next one is asked for, so latents leave before it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .cache import CacheSpec, KVCache
from .conditioning import Conditioner, Conditioning, check_conditioning
from .denoiser import Denoiser
from .edits import Edit
from .frozen import (
    WARM_LATENTS,
    FrozenCache,
    continued_schedule,
    newest,
    on_cpu,
    own_conditioning,
)
from .latent_store import LatentStore
from .model.config import HEAD_DIM
from .sampler import Rollout
from .schedule import Schedule, Timeline, check_edit
from .settings import SamplerSettings
from .shapes import LATENT_CHANNELS, PATCH, SPATIAL, TEMPORAL, check_size
from .start import check_start, start_chunks

CPU = torch.device("cpu")
NO_PLAN = -1


class GenerationError(RuntimeError):
    """Sampling failed in a way that another attempt would not mend (NaN)."""


class StreamLog(Protocol):
    """Whatever keeps a stream's history as it happens. A call that raises must change nothing."""

    def chunk(self, remembered: Remembered) -> None: ...

    def edit(self, conditioning: Conditioning) -> None: ...

    def close(self) -> None: ...


class Remembered(NamedTuple):
    """One chunk of a stream's history."""

    number: int
    latents_BCFHW: Tensor
    planned_at: int  # the chunk for which the keyframes it saw were planned, or NO_PLAN


History = Sequence[Conditioning | Remembered]  # the first conditioning, then chunks and edits


class _Entry(NamedTuple):
    first: int  # latent frame
    end: int
    planned_at: int


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
    Use `continue_from` for a cache, and `recording.resume` for a journal.
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
        timeline = Timeline.of(schedule, conditioner.fps)
        if start is not None:
            if cache is not None:
                raise ValueError("a cache goes on from its own end; leave the start out")
            check_start(start, len(settings.seeds), width, height, timeline.latent_frames)
            if settings.policy.sink < 1:  # a start image is never evicted
                settings = replace(settings, policy=replace(settings.policy, sink=1))
        if cache is not None:
            conditioner = _acquainted(conditioner, cache)
            if (settings.policy.sink, cache.settings.policy.sink, *cache.frames[:1]) == (0, 1, 0):
                # Its sink is there for a start image: the same settings go on with it.
                settings = replace(settings, policy=replace(settings.policy, sink=1))
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
        settings.check_length(timeline.latent_frames)

        self.model = model
        self.conditioner = conditioner
        self.settings = settings
        self.width, self.height = width, height
        self.before_pass: Callable[[], None] = lambda: None
        self.landed: list[dict[str, Any]] = []  # edits that took effect, as they are recorded
        conditioning = conditioner.prepare(schedule, version)
        self.check(conditioning)
        self._cache = cache
        self._base = cache.chunk if cache else 0  # chunks before this stream's own
        self._first = cache.frontier if cache else 0  # latent frames likewise
        self._latents = LatentStore()
        self._remembered: list[_Entry] = []  # the chunks there are: all else follows from it
        # (first chunk made under it, conditioning)
        self._versions: list[tuple[int, Conditioning]] = [(0, conditioning)]
        self._edits: deque[Edit] = deque()
        self._rollout: Rollout | None = None
        self._log: StreamLog | None = None
        self._lock = threading.RLock()
        for part in start_chunks(start.clone(), settings.chunk) if start is not None else ():
            self.remember(part)

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

    def check(self, conditioning: Conditioning) -> None:
        """Raise `ValueError` unless a conditioning is one that this stream can be made under."""
        self.settings.check_length(conditioning.timeline.latent_frames)
        # A host's module may not say how wide its input is.
        text_dim = getattr(self.model.denoiser.tree.text_embedding[0], "in_features", None)
        size = (self.height // SPATIAL, self.width // SPATIAL)
        check_conditioning(conditioning, len(self.settings.seeds), text_dim, size)

    @property
    def schedule(self) -> Schedule:
        return self.conditioning.schedule

    @property
    def timeline(self) -> Timeline:
        return self.conditioning.timeline

    @property
    def made(self) -> int:
        """Latent frames the video has so far, those before a continued cache included."""
        return self._remembered[-1].end if self._remembered else self._first

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

    @property
    def continued(self) -> FrozenCache | None:
        """The cache that this stream goes on from."""
        return self._cache

    # -- pulling ---------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Chunk]:
        """Yield every chunk from the first: remembered ones, then new ones."""
        index = 0
        while (chunk := self.chunk(index)) is not None:
            yield chunk
            index += 1

    def __len__(self) -> int:
        """Chunks remembered so far."""
        return len(self._remembered)

    def chunk(self, index: int) -> Chunk | None:
        """Return a chunk, sampling up to it where needed; None behind the end.

        Safe to call from several threads, and again after any exception.
        """
        with self._lock:
            while len(self) <= index:
                if not self._advance():
                    return None
            first = self._remembered[index].first
            conditioning = self._conditioning_at(index)
            step = conditioning.timeline.step_of(first)
            text = conditioning.schedule.steps[step].text
            return Chunk(index, first, self._latents[index].clone(), step, text)

    @torch.no_grad()
    def freeze(self) -> FrozenCache:
        """Return the cache as a value at the present chunk boundary."""
        with self._lock, self._in_words():
            rollout = self._caught_up()
            parts = [cache.contents() for cache in rollout.caches]
            count = len(self)
            own = [self._latents[i] for i in range(max(0, count - WARM_LATENTS), count)]
            size = (self.height // SPATIAL, self.width // SPATIAL)
            none = torch.empty(len(self.settings.seeds), LATENT_CHANNELS, 0, *size)
            before = none if self.warm is None else self.warm
            return FrozenCache(
                fingerprint=self.model.fingerprint,
                size=(self.width, self.height),
                fps=self.conditioner.fps,
                settings=self.settings,
                conditioning=own_conditioning(self.conditioning),
                chunk=rollout.chunk,
                frontier=rollout.frontier,
                planned_at=rollout.planned_at,
                frames=rollout.caches[0].frames,
                future=rollout.caches[0].future,
                keys=tuple(on_cpu(keys) for keys, _ in parts),
                values=tuple(on_cpu(values) for _, values in parts),
                warm=on_cpu(newest([before, *own])),
            )

    # -- editing ---------------------------------------------------------------------------------

    def edit(self, schedule: Schedule) -> Edit:
        """Propose a schedule from any thread; it takes effect at the next chunk boundary.

        Raises `ValueError` at once for what cannot be: a change to a finished step, an end that
        has passed. The stream may have moved on when the edit lands: then it is refused there.
        """
        check_edit(self.schedule, schedule, self.conditioner.fps, self.made)
        edit = Edit(schedule)
        self._edits.append(edit)
        return edit

    def _land_edits(self) -> None:
        while self._edits:
            edit = self._edits[0]
            try:
                check_edit(self.schedule, edit.schedule, self.conditioner.fps, self.made)
                version = self.conditioning.version + 1
                conditioning = self.conditioner.prepare(edit.schedule, version)
                self.check(conditioning)
            except Exception as error:  # the encoders' own too: an edit must not stop the stream
                self._edits.popleft()
                edit.settle("refused", self.made, str(error) or type(error).__name__)
                continue
            if self._log:
                self._log.edit(conditioning)
            self.put_in_force(conditioning)
            self._edits.popleft()
            edit.settle("landed", self.made)

    def put_in_force(self, conditioning: Conditioning) -> None:
        """Let a new version of the schedule hold from the next chunk on (already checked)."""
        self._versions.append((len(self), conditioning))
        self.landed.append(
            {
                "latent_frame": self.made,
                "seconds": max(0, self.made - 1) * TEMPORAL / self.conditioner.fps,
                "steps": conditioning.schedule.to_text(),
            }
        )

    def _conditioning_at(self, index: int) -> Conditioning:
        """The conditioning a chunk of this stream was made under."""
        return next(c for first, c in reversed(self._versions) if first <= index)

    # -- history ---------------------------------------------------------------------------------

    def attach(self, begin: Callable[[History], StreamLog]) -> None:
        """Keep a log from now on; `begin` makes it from the history so far."""
        with self._lock:
            (_, conditioning), *edits = self._versions
            history: list[Conditioning | Remembered] = [conditioning]
            for index in range(len(self) + 1):
                history += [edit for first, edit in edits if first == index]
                if index < len(self):
                    planned_at = self._remembered[index].planned_at
                    history.append(Remembered(index, self._latents[index], planned_at))
            self._log = begin(history)

    def close(self) -> None:
        """Close the log, if one is kept. The stream itself can still be pulled from."""
        with self._lock:
            if self._log:
                self._log.close()
            self._log = None

    # -- sampling --------------------------------------------------------------------------------

    @torch.no_grad()
    def _advance(self) -> bool:
        """Make one more chunk; False when the schedule is finished."""
        self._land_edits()
        left = self.timeline.latent_frames - self.made
        if left <= 0:
            return False
        with self._in_words():
            rollout = self._caught_up()
            latents = rollout.make(self.conditioning)[:, :, :left].cpu()
        self.remember(latents, rollout.planned_at if rollout.caches[0].future else NO_PLAN)
        return True

    def remember(self, latents_BCFHW: Tensor, planned_at: int = NO_PLAN) -> None:
        """Take in the clean latents of the next chunk: made, given, or read from a journal.

        `planned_at` is the chunk for which the keyframes it saw were planned. The last line
        settles it: up to there nothing has changed, whatever is raised.
        """
        while len(self._latents) > len(self):  # left by an interrupt
            self._latents.drop_last()
        self._latents.append(latents_BCFHW)
        if self._log:
            self._log.chunk(Remembered(len(self), latents_BCFHW, planned_at))
        end = self.made + latents_BCFHW.shape[2]
        self._remembered.append(_Entry(self.made, end, planned_at))

    def _caught_up(self) -> Rollout:
        """Return the rollout with the context passes of all remembered chunks behind it.

        One is due after every chunk; all are after a start or in a fresh process.
        """
        rollout = self._rollout = self._rollout or self._new_rollout()
        rollout.before_pass = self.before_pass
        for cache in rollout.caches:
            cache.grow(self.cache_spec.past)
        while (index := rollout.chunk - self._base) < len(self):
            conditioning = self._conditioning_at(index)
            # In a replay only the plan that is still in force has to be made again.
            if rollout.chunk == self._remembered[-1].planned_at != rollout.planned_at:
                rollout.replan(conditioning)
            rollout.commit(self._latents[index], conditioning)
        return rollout

    def _new_rollout(self) -> Rollout:
        branches = 2 if self.settings.cfg > 1 else 1
        caches = [KVCache(self.cache_spec, self.model.device) for _ in range(branches)]
        size = (self.height // SPATIAL, self.width // SPATIAL)
        rollout = Rollout(self.model.denoiser, caches, self.settings, size)
        if self._cache is not None:
            self._cache.put_into(rollout)
        return rollout

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except FloatingPointError as error:
            seconds = max(0, self.made - 1) * TEMPORAL / self.conditioner.fps
            raise GenerationError(
                f"{error} at {seconds:g} s; what was made before is kept: go on with another "
                "dtype (fp32), seed or cfg"
            ) from error


def _acquainted(conditioner: Conditioner, cache: FrozenCache) -> Conditioner:
    """Return a conditioner that also knows the embeddings which the cache brings along."""
    brought = cache.conditioning
    known = {**conditioner.known}
    for index, step in enumerate(brought.schedule.steps):
        if step.embeds is None:
            known.setdefault(brought.schedule.prompt(index), brought.texts[index])
    negative = brought.negative if conditioner.negative is None else conditioner.negative
    return replace(conditioner, known=known, negative=negative)
