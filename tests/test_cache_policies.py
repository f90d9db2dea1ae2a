"""Cache policies from outside: what they keep, what their hooks may do, and when a hook fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from sneakpeek_core import policy as policies
from sneakpeek_core.cache import KVCache
from sneakpeek_core.policy import CachePolicy, Content, Policy
from sneakpeek_core.sampler import Rollout
from tests.driven_cache import Driver, same, state_of
from tests.small import conditioner, settings, small_model, start, steps, stream


@torch.no_grad()
def test_a_new_policy_is_a_function_and_a_row(monkeypatch):
    """KV flush (keep the first frame and the last two) works by being entered in the table."""

    def flush(policy: CachePolicy, frames: Sequence[int], chunk: int) -> tuple[int, ...]:
        return tuple(f for f in frames if f == 0 or f >= frames[-1] - 1)

    monkeypatch.setitem(policies.POLICIES, "flush", Policy(flush))
    driver = Driver(policy=CachePolicy(window=7, positions="relative", policy="flush"))
    for _ in range(5):
        driver.step(3)
        assert driver.cache.frames == (0, len(driver.made) - 2, len(driver.made) - 1)
        driver.check()
    options = settings(policy=driver.policy, guidance=None)
    assert torch.isfinite(torch.cat([c.latents_BCFHW for c in stream(options=options)], 2)).all()


@torch.no_grad()
def test_an_eviction_hook_may_rewrite_the_sink(monkeypatch):
    """EMA sink: what leaves is mixed into the sink, and later passes see the new sink, rotated
    anew, with nothing changed outside the table."""
    share = 0.25

    def absorb(read: Callable[[int], Content], evicted: tuple[int, ...]) -> dict[int, Content]:
        keys, values = read(0)
        for frame in evicted:
            gone = read(frame)
            keys, values = keys.lerp(gone[0], share), values.lerp(gone[1], share)
        return {0: (keys, values)}

    monkeypatch.setitem(policies.POLICIES, "ema", Policy(policies.sink_and_window, absorb))
    driver = Driver(policy=CachePolicy(sink=1, window=4, positions="relative", policy="ema"))
    held: list[int] = []
    for _ in range(6):
        driver.step(2)
        evicted = [f for f in held if f not in driver.cache.frames]
        sink = driver.made[0]
        for frame in evicted:
            gone = driver.made[frame]
            for stored in ("keys", "values"):
                mixed = torch.lerp(getattr(sink, stored), getattr(gone, stored), share)
                setattr(sink, stored, mixed)
        driver.check()  # rotates the sink, before the next eviction rewrites it
        held = list(driver.cache.frames)
    assert held == [0, 10, 11]


@torch.no_grad()
def test_evicted_frames_can_be_read_in_the_hook(monkeypatch):
    """A policy may drop a frame of the chunk that has just been made; its hook can read that
    frame like any other that leaves."""
    seen: dict[int, Tensor] = {}

    def newest(policy: CachePolicy, frames: Sequence[int], chunk: int) -> tuple[int, ...]:
        return tuple(f for f in frames if f == 0 or f == frames[-1])

    def look(read: Callable[[int], Content], evicted: tuple[int, ...]) -> dict[int, Content]:
        for frame in evicted:
            seen[frame] = read(frame)[1].clone()
        return {}

    monkeypatch.setitem(policies.POLICIES, "newest", Policy(newest, look))
    driver = Driver(policy=CachePolicy(window=6, positions="relative", policy="newest"))
    for _ in range(3):
        driver.step(3)
    assert sorted(seen) == [1, 2, 3, 4, 5, 6, 7]
    for frame, values in seen.items():
        assert torch.equal(values, driver.made[frame].values)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@torch.no_grad()
def test_commit_is_all_or_nothing(kind: type[BaseException], monkeypatch):
    """An exception in an eviction hook leaves the cache where it was; committing again works."""
    failing = [True]

    def hook(read: Callable[[int], Content], evicted: tuple[int, ...]) -> dict[int, Content]:
        if failing[0]:
            raise kind
        return {}

    keep = policies.sink_and_window
    monkeypatch.setitem(policies.POLICIES, "fragile", Policy(keep, hook))
    driver = Driver(policy=CachePolicy(sink=1, window=4, positions="relative", policy="fragile"))
    driver.step(2)
    before = state_of(driver.cache)
    chunk = driver.new(2)
    driver.write(chunk)
    with pytest.raises(kind):
        driver.cache.commit(driver.cache.settle([2, 3], driver.policy, 2))
    assert same(before, state_of(driver.cache))
    driver.check()
    driver.write(chunk)
    failing[0] = False
    driver.cache.commit(driver.cache.settle([2, 3], driver.policy, 2))
    driver.made += chunk
    assert driver.cache.frames == (0, 2, 3)
    driver.check()


@torch.no_grad()
def test_commit_of_both_branches_is_all_or_nothing(monkeypatch):
    """With cfg there are two caches: an exception while the second one commits leaves both, and
    committing again gives what an undisturbed run gives."""
    calls = [0]

    def run(fail_at: int) -> tuple[tuple, tuple]:
        calls[0] = 0

        def hook(read: Callable[[int], Content], evicted: tuple[int, ...]) -> dict[int, Content]:
            calls[0] += 1
            if calls[0] == fail_at:
                raise RuntimeError("interrupted")
            (sink, values) = read(0)  # once more would be twice too much
            return {0: (sink * 1.5, values * 0.5)}

        keep = policies.sink_and_window
        monkeypatch.setitem(policies.POLICIES, "fragile", Policy(keep, hook))
        options = settings(
            cfg=3.0, guidance=None,
            policy=CachePolicy(sink=1, window=4, positions="relative", policy="fragile"),
        )  # fmt: skip
        spec = stream(options=options).cache_spec
        caches = [KVCache(spec), KVCache(spec)]
        rollout = Rollout(small_model().denoiser, caches, options, (4, 4))
        told = conditioner().prepare(steps())
        for part in start(7).split([1, 2, 2, 2], dim=2):
            try:
                rollout.commit(part, told)
            except RuntimeError:
                frames = {cache.frames for cache in caches}
                assert len(frames) == 1, f"the branches differ: {frames}"
                rollout.commit(part, told)
        return state_of(caches[0]), state_of(caches[1])

    undisturbed = run(fail_at=0)
    assert calls[0] >= 4
    disturbed = run(fail_at=2)
    assert all(map(same, undisturbed, disturbed))
