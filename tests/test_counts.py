"""What a pass costs, counted: no copies of the cache, no host syncs, nothing that grows."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sneakpeek_core.cache import KVCache
from sneakpeek_core.denoiser import Denoiser
from sneakpeek_core.guidance import FutureGuidance
from sneakpeek_core.sampler import Rollout
from sneakpeek_core.settings import SamplerSettings
from tests.small import GUIDANCE, settings, small_model, steps, stream

CHUNKS, WARM = 200, 40
GROWTH = 0.02  # of the process's memory
SYNCS = ("_local_scalar_dense", "item", "nonzero")
JOINT = FutureGuidance(mode="joint", strength=2.0)
OPTIONS = {
    "plain": settings(guidance=None),
    "planned": settings(guidance=replace(GUIDANCE, strength=2.0, refresh=1)),
    "joint": settings(guidance=JOINT),
    "cfg": settings(cfg=3.0),
}


class Watch(TorchDispatchMode):
    """Counts operations, and notes those that must not happen."""

    def __init__(self, caches: tuple[KVCache, ...]):
        super().__init__()
        parts = [part for cache in caches for part in (cache.keys, cache.rotated, cache.values)]
        self.storages = {part.untyped_storage().data_ptr() for part in parts}
        self.limit = min(part.untyped_storage().nbytes() for part in parts)
        self.seen: Counter[str] = Counter()
        self.joined = 0  # torch.cat on the cache
        self.written = 0  # in-place writes to the cache
        self.largest = 0  # bytes of the largest new tensor
        self.inside = 0  # nested calls of a pass
        self.waited = 0  # host syncs inside a pass

    def passing(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return `call`, noting that what happens in it happens inside a pass."""

        def watched(*args: Any) -> Tensor:
            self.inside += 1
            try:
                return call(*args)
            finally:
                self.inside -= 1

        return watched

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.seen[name] += 1
        if self.inside and name in SYNCS:
            self.waited += 1
        given = list(chain.from_iterable(map(tensors_of, args)))
        if name == "cat":
            self.joined += any(self.is_cache(t) for t in given)
        if name == "copy_":
            self.written += self.is_cache(args[0])
        made = func(*args, **(kwargs or {}))
        for tensor in tensors_of(made):
            if tensor.untyped_storage().data_ptr() not in {
                t.untyped_storage().data_ptr() for t in given
            }:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return made

    def is_cache(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.storages


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors_of(part)]
    return []


def running(options: SamplerSettings, chunks: int) -> tuple[Rollout, Any]:
    """Return a rollout with that many chunks behind it, so that its window is full."""
    source = stream(steps("[2s] lift it", "[2s] turn it", "[20s] put it down"), options)
    for index in range(chunks):
        source.chunk(index)
    source.freeze()  # runs the context pass that is still due
    assert source.rollout is not None
    return source.rollout, source.conditioning


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_a_chunk_copies_no_cache_and_never_waits(name: str):
    """Planning, denoising and the context pass join nothing with the cache and allocate nothing
    as large as one part of it; no pass hands a value to the host. What a chunk, a plan or a
    context pass gave is looked at once, behind its last pass (for NaN)."""
    rollout, conditioning = running(OPTIONS[name], 6)
    passes: list[int] = []
    rollout.before_pass = lambda: passes.append(1)
    watch = Watch(rollout.caches)
    with watch, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Denoiser, "__call__", watch.passing(Denoiser.__call__))
        latents = rollout.make(conditioning)
        rollout.commit(latents, conditioning)
    assert len(passes) == (6 if name == "planned" else 3)
    assert watch.written > 0, "the watch does not see the cache"
    assert watch.seen["cat"] > 0
    assert watch.joined == 0
    assert watch.waited == 0
    looks = 3 if name == "planned" else 2
    assert sum(watch.seen[sync] for sync in SYNCS) == looks
    assert 0 < watch.largest < watch.limit


@torch.no_grad()
def test_the_watch_sees_what_it_looks_for():
    """A copy of the cache, a host sync and a large allocation would be noticed."""
    rollout, _ = running(OPTIONS["plain"], 1)
    cache = rollout.caches[0]
    watch = Watch(rollout.caches)
    with watch:
        watch.passing(lambda: torch.full((1,), cache.keys[0, 0, 0, 0, 0, 0].item()))()
        torch.cat([cache.values[0, :, :2], cache.values[0, :, 3:]], dim=1)
        cache.keys[0, 0, 0, 0, 0, 0].item()
        cache.keys.clone()
    assert watch.joined == 1
    assert watch.seen["_local_scalar_dense"] == 2
    assert watch.waited == 1
    assert watch.largest >= watch.limit


@torch.no_grad()
def test_every_chunk_costs_the_same_operations():
    """Once the window is full, chunk after chunk runs the very same number of operations."""
    rollout, conditioning = running(OPTIONS["plain"], 12)
    counts = []
    for _ in range(5):
        with Watch(rollout.caches) as watch:
            rollout.commit(rollout.make(conditioning), conditioning)
        counts.append(watch.seen)
    later = counts[1:]  # freezing has moved frames that the first chunk would have moved
    assert all(count == later[0] for count in later)


@pytest.mark.parametrize("name", ["plain", "planned"])
def test_a_long_video_needs_no_more_than_a_short_one(name: str, record_property):
    """Over 200 chunks the cache keeps its bytes and its storages, and the process its memory."""
    schedule = steps(*(["[25s] turn it", "[25s] lift it"] * 2))
    source = stream(schedule, OPTIONS[name], model=small_model())
    assert source.timeline.latent_frames == 1 + 2 * CHUNKS
    process = psutil.Process()
    stated = source.cache_spec.total_bytes
    seconds: list[float] = []
    memory: list[int] = []
    storages = set()
    source.chunk(0)  # the start image
    for index in range(1, CHUNKS + 1):
        began = time.perf_counter()
        assert source.chunk(index) is not None
        seconds.append(time.perf_counter() - began)
        assert source.rollout is not None
        (cache,) = source.rollout.caches
        parts = [part.untyped_storage() for part in (cache.keys, cache.rotated, cache.values)]
        storages.add(tuple(part.data_ptr() for part in parts))
        assert sum(part.nbytes() for part in parts) == stated
        assert len(cache.frames) <= 6
        if index >= WARM and index % 20 == 0:
            gc.collect()
            memory.append(process.memory_info().rss)
    assert source.chunk(CHUNKS + 1) is None
    assert len(storages) == 1, "the cache was allocated again"
    assert max(memory) - memory[0] < GROWTH * memory[0], [m >> 10 for m in memory]
    blocks = [1000 * sum(seconds[i : i + 40]) / 40 for i in range(0, CHUNKS, 40)]
    record_property("ms_per_chunk", [round(ms, 2) for ms in blocks])
    record_property("rss_mib", [m >> 20 for m in memory])
    print(f"{name}: ms per chunk, 40 at a time: {', '.join(f'{ms:.1f}' for ms in blocks)}")
