"""A cache as a value: frozen at a chunk boundary, on the CPU, saved, loaded and continued.

Continuing copies out of it, so a frozen cache can be continued any number of times and every
continuation is on its own. It holds what the next chunk needs and nothing that can be made again:
not the decoder's state (gigabytes at full size), but the newest latents to warm a decoder with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .cache import Keyframe
from .conditioning import Conditioner, Conditioning
from .model.config import HEAD_DIM
from .records import (
    DAMAGED,
    Record,
    metadata_of,
    record_of,
    schedule_from_record,
    schedule_to_record,
    settings_from_json,
    settings_to_json,
    size_from_json,
    string_from_json,
)
from .sampler import Rollout
from .schedule import Schedule, is_number, is_whole
from .settings import SamplerSettings
from .shapes import LATENT_CHANNELS, SIZE_STEP, SPATIAL, check_size
from .whole_file import whole_file

KIND = "cache"
# Latent frames kept to warm a decoder: the Wan VAE's memory is longer, but with these the seam is
# above 57 dB on random weights, whose memory is the longest (12 give 39 to 51 dB).
WARM_LATENTS = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenCache:
    """Everything a generation needs to go on. Tensors are on the CPU; do not write to them.

    `keys` (before RoPE) and `values` are [layers, B, keyframes + frames, S, N, D], one per
    branch. `warm` are the newest clean latents [B, C, F, H, W].
    """

    fingerprint: str  # of the model's weights and patches
    size: tuple[int, int]  # width, height in pixels
    fps: float
    settings: SamplerSettings
    conditioning: Conditioning
    chunk: int
    frontier: int  # latent frames the video has
    planned_at: int
    frames: tuple[int, ...]  # held past frames
    future: tuple[Keyframe, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    warm: Tensor

    @property
    def total_bytes(self) -> int:
        tensors = (*self.keys, *self.values, self.warm)
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def content_id(self) -> str:
        """Return a short name of the content, for a journal to say what it continues."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.fingerprint, self.size, self.chunk, self.frontier)).encode())
        digest.update(self.warm.float().numpy().tobytes())
        return digest.hexdigest()

    def check(
        self, *, fingerprint: str, size: tuple[int, int], fps: float, settings: SamplerSettings
    ) -> None:
        """Raise `ValueError` naming the first thing that keeps this cache from being continued.

        Steps, seed, sigmas and guidance may differ; whatever shaped its contents may not. The
        dtype may differ too: contents are converted when they are put into a rollout.
        """
        if self.fingerprint != fingerprint:
            raise ValueError(
                "the cache was made with another model (or other LoRAs): its weights are "
                f"{self.fingerprint[:8]}, these are {fingerprint[:8]}; load that model, or start "
                "anew"
            )
        mine, policy = self.settings, settings.policy
        for name, own, wanted in (
            ("size", "x".join(map(str, self.size)), "x".join(map(str, size))),
            ("frame rate", f"{self.fps:g}", f"{fps:g}"),
            ("a batch of", len(mine.seeds), len(settings.seeds)),
            ("chunk", mine.chunk, settings.chunk),
            ("sink", mine.policy.sink, policy.sink),
            ("window", mine.policy.window or "all", policy.window or "all"),
            ("positions", mine.policy.positions, policy.positions),
            ("policy", mine.policy.policy, policy.policy),
            ("context sigma", f"{mine.context_sigma:g}", f"{settings.context_sigma:g}"),
            ("cfg", *("above 1" if s.cfg > 1 else "1" for s in (mine, settings))),
        ):
            if own != wanted:
                raise ValueError(
                    f"the cache was made with {name} {own}, not {wanted}; use {own}, or start anew"
                )

    def put_into(self, rollout: Rollout) -> None:
        """Copy the contents into a fresh rollout, which then goes on from here.

        Keyframes come along only where guidance is the same: another one plans its own.
        """
        same = self.settings.guidance == rollout.settings.guidance
        future = self.future if same else ()
        skip = len(self.future) - len(future)
        for cache, keys, values in zip(rollout.caches, self.keys, self.values, strict=True):
            cache.fill(self.frames, future, keys[:, :, skip:], values[:, :, skip:])
        rollout.chunk, rollout.frontier = self.chunk, self.frontier
        rollout.planned_at = self.planned_at

    def save(self, path: str | Path) -> None:
        """Write the cache to a safetensors file, whole or not at all."""
        path = Path(path)
        record = self._to_record()
        tensors = {name: t.contiguous() for name, t in record.tensors.items()}
        with whole_file(path) as part:
            save_file(tensors, part, metadata=metadata_of(record))

    @classmethod
    def load(cls, path: str | Path) -> FrozenCache:
        """Read a cache file; `ValueError` when it is missing, damaged or something else."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"cache {path} does not exist; save one with --save-cache")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            record = record_of(metadata, tensors)
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"{path} is not a cache that can be read ({error}); save it again with --save-cache"
            ) from error
        if record.kind != KIND:
            raise ValueError(f"{path} holds a {record.kind}, not a cache; use a --save-cache file")
        try:
            return cls._from_record(record)
        except DAMAGED as error:
            raise ValueError(f"cache {path} is damaged ({error}); make it again") from error

    def _to_record(self) -> Record:
        schedule, tensors = schedule_to_record(self.conditioning)
        header: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "size": list(self.size),
            "fps": self.fps,
            "settings": settings_to_json(self.settings),
            "schedule": schedule,
            "chunk": self.chunk,
            "frontier": self.frontier,
            "planned_at": self.planned_at,
            "frames": list(self.frames),
            "future": [list(key) for key in self.future],
        }
        for branch, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            tensors[f"keys.{branch}"], tensors[f"values.{branch}"] = keys, values
        return Record(KIND, header, tensors | {"warm": self.warm})

    @classmethod
    def _from_record(cls, record: Record) -> FrozenCache:
        header, tensors = record.header, record.tensors
        conditioner = Conditioner(fps=header["fps"], negative=tensors.get("negative"))
        schedule = schedule_from_record(header["schedule"], tensors, conditioner)
        branches = sorted(name for name in tensors if name.startswith("keys."))
        frozen = cls(
            fingerprint=string_from_json(header["fingerprint"]),
            size=size_from_json(header["size"]),
            fps=header["fps"],
            settings=settings_from_json(header["settings"]),
            conditioning=conditioner.prepare(schedule, header["schedule"]["version"]),
            chunk=header["chunk"],
            frontier=header["frontier"],
            planned_at=header["planned_at"],
            frames=tuple(header["frames"]),
            future=tuple(Keyframe(*key) for key in header["future"]),
            keys=tuple(tensors[name] for name in branches),
            values=tuple(tensors[name.replace("keys", "values")] for name in branches),
            warm=tensors["warm"],
        )
        frozen._check_whole()
        return frozen

    def _check_whole(self) -> None:
        """Raise `ValueError` unless the parts agree with one another: a file may say anything."""
        width, height = self.size
        check_size(width, height)
        self._check_counts()
        batch, held = len(self.settings.seeds), len(self.frames) + len(self.future)
        tokens = (height // SIZE_STEP) * (width // SIZE_STEP)
        branches = 2 if self.settings.cfg > 1 else 1
        if len(self.keys) != branches or len(self.values) != branches:
            raise ValueError(f"keys and values of {branches} branches were expected")
        for part in (*self.keys, *self.values):
            fits = part.dim() == 6 and part.shape[1:4] == (batch, held, tokens)
            if not fits or part.shape[5] != HEAD_DIM or part.shape != self.keys[0].shape:
                raise ValueError(f"keys and values of {held} frames of {tokens} were expected")
        latent = (batch, LATENT_CHANNELS, height // SPATIAL, width // SPATIAL)
        warm = self.warm.shape
        if len(warm) != 5 or (*warm[:2], *warm[3:]) != latent:
            raise ValueError(f"its latents are {tuple(warm)}")
        for part in (*self.keys, *self.values, self.warm):
            if not part.is_floating_point() or not torch.isfinite(part).all():
                raise ValueError("its tensors are not all finite fractions")

    def _check_counts(self) -> None:
        whole = (self.chunk, self.frontier, self.planned_at, *self.frames)
        if not all(map(is_whole, (*whole, *(key.frame for key in self.future)))):
            raise ValueError("its frames are no whole numbers")
        end = self.conditioning.timeline.latent_frames
        if not -1 <= self.planned_at <= self.chunk or not 0 <= self.chunk <= self.frontier <= end:
            raise ValueError(f"chunk {self.chunk} and frame {self.frontier} of {end} do not agree")
        ordered = list(self.frames) == sorted({f for f in self.frames if 0 <= f < self.frontier})
        if not ordered or len(self.future) > self.settings.keyframes:
            raise ValueError(f"its frames {self.frames} are not those of {self.frontier}")
        # A plan made with a longer span may still be in force, but it ends with the steps.
        limit = max(self.frontier + self.settings.span, end)
        for key in self.future:
            if not 0 <= key.frame < limit or not is_number(key.sigma):
                raise ValueError(f"a keyframe at {key.frame} is not among the {limit} in reach")


def continued_schedule(cache: FrozenCache, more: Schedule | None) -> Schedule:
    """Return the schedule a continuation follows: the cache's own, with `more` behind it."""
    own = cache.conditioning.schedule
    if more is not None:
        return own.extended(more)
    if cache.conditioning.timeline.latent_frames <= cache.frontier:
        raise ValueError("the cache's steps are all generated; give it more steps to go on with")
    return own


def on_cpu(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU that shares nothing with `tensor`."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def own_conditioning(conditioning: Conditioning) -> Conditioning:
    """Return it with copies of its tensors on the CPU; steps that shared one share the copy."""
    copies: dict[int, Tensor] = {}

    def copied(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in copies:
            copies[id(tensor)] = on_cpu(tensor)
        return copies[id(tensor)]

    texts = tuple(copied(text) for text in conditioning.texts)
    goals = tuple(copied(goal) for goal in conditioning.goals)
    schedule = conditioning.schedule
    steps = tuple(
        replace(step, embeds=None if step.embeds is None else text, goal=goal)
        for step, text, goal in zip(schedule.steps, texts, goals, strict=True)
    )
    return replace(
        conditioning, schedule=replace(schedule, steps=steps), texts=texts, goals=goals,
        negative=copied(conditioning.negative),
    )  # fmt: skip


def newest(parts: Sequence[Tensor], latent_frames: int = WARM_LATENTS) -> Tensor:
    """Return the last `latent_frames` of latents given in parts along F."""
    return torch.cat(list(parts), dim=2)[:, :, -latent_frames:]
