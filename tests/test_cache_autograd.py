"""The cache in training: with gradients it gives what it gives in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sneakpeek_core.cache import CacheView, KVCache
from sneakpeek_core.model.forward import sdpa
from sneakpeek_core.policy import CachePolicy
from tests.driven_cache import LAYERS, Driver

Views = Callable[[KVCache], CacheView]


@pytest.mark.parametrize(
    "view",
    [
        lambda cache: cache.view(2),
        lambda cache: cache.view(2, 2),
        lambda cache: cache.view(2, 2, strength=2.0),
        lambda cache: cache.view(2, 2, write_keyframes=True),
        lambda cache: cache.view(2, keep=True),
        lambda cache: cache.view(0, 2, write_keyframes=True, keep=True),
    ],
    ids=["plain", "guided", "stronger", "joint", "context", "plan"],
)
def test_autograd_path_equals_the_in_place_path(view: Views):
    """With gradients the new keys are concatenated instead of written in place: the same keys,
    values and mask, the same cache afterwards, gradients to what is new and none to history."""
    made: dict[bool, list[tuple[Any, ...]]] = {}
    stored: dict[bool, list[Tensor]] = {}
    for grad in (False, True):
        with torch.no_grad():
            driver = Driver(policy=CachePolicy(sink=1, window=5, positions="relative"))
            for _ in range(3):
                driver.step(2)
            driver.plan(2)
            driver.arrange()
        cache, past = driver.cache, driver.positions[1]
        look = view(cache)
        count = sum(segment.frames for segment in look._writes)
        rope = cache.rope([past + i for i in range(count)])
        new = driver.new(count)
        made[grad] = []
        for layer in range(LAYERS):
            k, v = (
                torch.cat([getattr(frame, part)[layer] for frame in new], dim=1)
                for part in ("keys", "values")
            )
            k.requires_grad_(grad)
            v.requires_grad_(grad)
            with torch.set_grad_enabled(grad):
                keys, values, mask = look(layer, k, v, rope)
                out = sdpa(k[:, :3], keys, values, mask)
            made[grad].append((keys.detach(), values.detach(), mask, out.detach()))
            if not grad:
                assert keys.untyped_storage().data_ptr() == (
                    cache.rotated.untyped_storage().data_ptr()
                ), "in place: no copy"
                continue
            query_only = torch.autograd.grad(
                sdpa(k[:, :3], keys.detach(), values.detach(), mask).sum(), k
            )[0]
            k_grad, v_grad = torch.autograd.grad(out.sum(), (k, v))
            assert (v_grad != 0).all(), "every new value is attended to"
            assert ((k_grad - query_only).abs() > 1e-9).float().mean() > 0.95
        assert not any(t.requires_grad for t in (cache.keys, cache.rotated, cache.values))
        stored[grad] = [t.clone() for t in (cache.keys, cache.rotated, cache.values)]
    for plain, graded in zip(made[False], made[True], strict=True):
        for one, other in zip(plain, graded, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    assert all(map(torch.equal, stored[False], stored[True]))


def test_a_view_is_void_when_the_cache_has_moved_on():
    """A recomputation in backward would find other frames in the slots: it is refused, never
    silently wrong."""
    driver = Driver(policy=CachePolicy(sink=1, window=4, positions="relative"))
    with torch.no_grad():
        driver.step(2)
        driver.arrange()
        look = driver.cache.view(2)
        rope = driver.cache.rope([1.0, 2.0])
        k = torch.cat([frame.keys[0] for frame in driver.new(2)], dim=1)
        look(0, k, k, rope)
        driver.step(2)
        with pytest.raises(RuntimeError, match="the cache has moved on"):
            look(0, k, k, rope)


def test_training_queries_alone_leaves_no_view_of_the_storage_in_the_graph():
    """Even where new keys need no gradient, the graph holds copies: later chunks may write."""
    driver = Driver(policy=CachePolicy(sink=1, window=6, positions="relative"))
    with torch.no_grad():
        driver.step(2)
        driver.arrange()
    k = torch.cat([frame.keys[0] for frame in driver.new(2)], dim=1)
    q = k.clone().requires_grad_()
    keys, values, mask = driver.cache.view(2)(0, k, k, driver.cache.rope([2.0, 3.0]))
    out = sdpa(q, keys, values, mask).sum()
    driver.cache.values.zero_()  # as the next chunk's passes would
    out.backward()
    assert q.grad is not None and torch.isfinite(q.grad).all() and q.grad.abs().sum() > 0


def test_a_cache_made_under_inference_mode_works_outside_it():
    """Hosts make it inside; another thread may go on outside, and the other way round."""
    policy = CachePolicy(sink=1, window=4, positions="relative")
    with torch.inference_mode():
        inside = Driver(policy=policy)
        inside.step(2)
    with torch.no_grad():
        inside.step(2)
        inside.cache.grow(12)
        outside = Driver(policy=policy)
        outside.step(2)
    with torch.inference_mode():
        outside.step(2)
        inside.step(2)
    assert inside.cache.frames == (0, 4, 5) and outside.cache.frames == (0, 2, 3)
