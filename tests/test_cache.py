"""The dual-region cache against a list of frames in plain Python."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sneakpeek_core.cache import CacheSpec, KVCache
from sneakpeek_core.model.forward import sdpa
from sneakpeek_core.policy import CachePolicy
from tests.driven_cache import (
    BANDS,
    BATCH,
    COLUMNS,
    HEADS,
    ROWS,
    SIZE,
    SPEC,
    Driver,
    Made,
    call,
    check_attended,
    key_of,
    same,
    state_of,
)
from tests.small import CONFIG


@dataclass
class Reference:
    """The cache as a list: (frame number, keys and values), and the keyframes."""

    past: list[tuple[int, Made]] = field(default_factory=list)
    future: list[tuple[int, Made]] = field(default_factory=list)

    @property
    def numbers(self) -> list[int]:
        return [number for number, _ in self.past]


# -- what a pass attends to ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(16))
@torch.no_grad()
def test_passes_see_what_a_list_holds(seed: int):
    """Over random chunks, sinks, windows, plans and positions, a pass attends to exactly
    [keyframes | kept past in order | open chunk], at the right positions, whatever was evicted,
    moved and overwritten before."""
    rng, draw = random.Random(seed), torch.Generator().manual_seed(seed)
    sink, chunk = rng.randint(0, 3), rng.randint(1, 3)
    policy = CachePolicy(
        sink=sink,
        window=rng.choice([None, rng.randint(chunk, 7)]),
        positions=rng.choice(["absolute", "relative"]),
    )
    total = 14 * chunk
    spec = replace(SPEC, past=policy.capacity(total), future=rng.randint(0, 3))
    cache, held, frontier = KVCache(spec), Reference(), 0

    while frontier + chunk <= total:
        # A start image is a chunk of its own, and so may be any first chunk.
        size = 1 if frontier == 0 and rng.random() < 0.5 else chunk
        if spec.future and rng.random() < 0.4:
            _plan(cache, held, policy, frontier, rng, draw)

        def place(held: Reference = held, at: int = frontier):
            past, first = policy.place(held.numbers, at)
            return list(past), [first + number - at for number, _ in held.future], first

        past, ahead, first = place()
        cache.arrange(past, ahead)
        assert cache.frames == tuple(held.numbers)
        opened = [first + i for i in range(size)]
        for _ in range(rng.randint(1, 3)):  # denoising passes, none of which leaves a trace
            open_chunk = [Made(draw) for _ in range(size)]
            shown = rng.randint(0, len(held.future))
            seen = held.future[len(held.future) - shown :]
            attended = call(cache.view(size, shown), cache, open_chunk, opened)
            check_attended(
                attended,
                [made for _, made in [*seen, *held.past]] + open_chunk,
                [*ahead[len(ahead) - shown :], *past, *opened],
            )
        if spec.future and not held.future:  # joint: keyframes denoised behind the chunk
            count = rng.randint(1, spec.future)
            both = [Made(draw) for _ in range(size + count)]
            far = [first + size + 2.0 * i for i in range(count)]
            view = cache.view(size, count, write_keyframes=True)
            check_attended(
                call(view, cache, both, opened + far),
                [*both[size:], *(made for _, made in held.past), *both[:size]],
                [*far, *past, *opened],
            )
        if rng.random() < 0.2:  # interrupted: the same chunk begins again
            continue
        clean = [Made(draw) for _ in range(size)]
        attended = call(cache.view(size, keep=True), cache, clean, opened)
        check_attended(attended, [m for _, m in held.past] + clean, [*past, *opened])
        numbers = range(frontier, frontier + size)
        cache.commit(cache.settle(numbers, policy, chunk))
        frontier += size
        held.past += zip(numbers, clean, strict=True)
        newest = frontier - (total if policy.window is None else policy.window - chunk)
        held.past = [(n, made) for n, made in held.past if n < sink or n >= newest]
        assert cache.frames == tuple(held.numbers)
    assert frontier > 10 * chunk


def _plan(
    cache: KVCache,
    held: Reference,
    policy: CachePolicy,
    frontier: int,
    rng: random.Random,
    draw: torch.Generator,
) -> None:
    cache.drop_plan()
    held.future = []
    count = rng.randint(0, cache.spec.future)
    if not count:
        return
    past, first = policy.place(held.numbers, frontier)
    numbers = [frontier + 2 + 3 * i for i in range(count)]
    at = [first + number - frontier for number in numbers]
    cache.arrange(past, [])
    made: list[Made] = []
    for _ in range(2):
        made = [Made(draw) for _ in range(count)]
        view = cache.view(0, count, write_keyframes=True, keep=True)
        check_attended(call(view, cache, made, at), made + [m for _, m in held.past], [*at, *past])
    cache.commit_plan([key_of(number) for number in numbers])
    held.future = list(zip(numbers, made, strict=True))


# -- traces and atomicity --------------------------------------------------------------------------


@torch.no_grad()
def test_uncommitted_passes_leave_no_trace():
    """Passes that no commit follows, keeping or not, change nothing that a later pass sees; those
    that keep nothing do not write keys before RoPE at all."""
    driver = Driver(policy=CachePolicy(sink=1, window=5, positions="relative"))
    for _ in range(4):
        driver.step(2)
    driver.plan(2)
    driver.arrange()
    before = state_of(driver.cache)
    for keep in (False, True):
        unrotated = driver.cache.keys.clone()
        view = driver.cache.view(2, 2, keep=keep)
        call(view, driver.cache, driver.new(2), [30.0, 31.0])
        assert torch.equal(unrotated, driver.cache.keys) != keep
        assert same(before, state_of(driver.cache))
    driver.check(keyframes=2)


@torch.no_grad()
def test_arranging_can_be_interrupted_anywhere():
    """Moving and rotating frames can stop at any copy, and be done again."""

    class Bomb(TorchDispatchMode):
        def __init__(self, fuse: int):
            super().__init__()
            self.fuse = fuse

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default:
                self.fuse -= 1
                if self.fuse < 0:
                    raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    for fuse in range(40):
        driver = Driver(policy=CachePolicy(sink=1, window=5, positions="relative"), seed=fuse)
        for _ in range(4):
            driver.step(2)  # the last commit has evicted: there is something to move
        try:
            with Bomb(fuse):
                driver.arrange()
        except KeyboardInterrupt:
            driver.check()
            continue
        assert fuse > 6, "nothing was moved"
        return
    raise AssertionError("the fuse never held")


def test_a_chunk_that_does_not_fit_is_refused():
    """A view beyond the allocated slots says how many there are and how many are taken."""
    driver = Driver()
    for _ in range(3):
        driver.step(2)
    with pytest.raises(ValueError, match=r"has 8 latent frames of which 6 .* chunk of 3 does not"):
        driver.cache.view(3)


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("past", "future"), [(7, 0), (21, 2), (1, 8)])
def test_bytes_are_known_before_allocation(past: int, future: int, dtype: torch.dtype):
    """The sizes a spec states are the bytes of the storages, in total and region by region."""
    spec = replace(SPEC, past=past, future=future, dtype=dtype)
    total, in_future, in_past = spec.total_bytes, spec.future_bytes, spec.past_bytes
    cache = KVCache(spec)
    parts = (cache.keys, cache.rotated, cache.values)
    assert sum(part.untyped_storage().nbytes() for part in parts) == total
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 3
    split = [part.split([future, past], dim=2) for part in parts]
    assert sum(region[0].nbytes for region in split) == in_future
    assert sum(region[1].nbytes for region in split) == in_past


def test_size_of_the_published_model():
    """1.3B at 832x480 in bf16: 274 MiB of keys and values a latent frame (algorithms.md 2.5);
    the rotated keys come on top."""
    spec = CacheSpec(
        layers=30, heads=12, head_dim=128, rows=30, columns=52, past=9, future=2,
        dtype=torch.bfloat16,
    )  # fmt: skip
    assert spec.tokens_per_frame == 1560
    assert round(spec.bytes_per_frame * 2 / 3 / 2**20) == 274
    assert spec.total_bytes == 11 * spec.bytes_per_frame


def test_small_models_have_the_heads_of_wan():
    """The tests with a whole model use head size 128, the tests here a smaller one."""
    assert CONFIG.heads == 1
    assert SPEC.head_dim == SIZE == 2 * sum(BANDS)


# -- growing, freezing -----------------------------------------------------------------------------


@torch.no_grad()
def test_growing_keeps_contents():
    """A larger cache holds the same frames and keyframes, and has room for more."""
    driver = Driver()
    driver.step(3)
    driver.step(3)
    driver.plan(2)
    before = state_of(driver.cache)
    driver.cache.grow(5)
    assert driver.cache.spec.past == 8, "it never shrinks"
    driver.cache.grow(12)
    assert driver.cache.spec == replace(SPEC, past=12)
    assert sum(
        t.nbytes for t in (driver.cache.keys, driver.cache.rotated, driver.cache.values)
    ) == (driver.cache.spec.total_bytes)
    assert same(before, state_of(driver.cache))
    driver.check(keyframes=2)
    driver.step(3)
    driver.step(3)
    assert driver.cache.frames == tuple(range(12))


@torch.no_grad()
def test_contents_fill_another_cache():
    """What a cache holds, put into an empty one (of another size), is seen alike there; filling
    copies, so neither affects the other."""
    policy = CachePolicy(sink=1, window=5, positions="relative")
    driver = Driver(policy=policy)
    for _ in range(4):
        driver.step(2)
    driver.plan(2)
    frozen = state_of(driver.cache)
    assert frozen[2].shape[2] == len(driver.cache.frames) + 2

    twin = Driver(replace(SPEC, past=10, future=4), policy)
    twin.cache.fill(*frozen)
    twin.made, twin.planned = list(driver.made), driver.planned
    assert same(frozen, state_of(twin.cache))
    twin.check(keyframes=2)
    twin.step(2)
    assert same(frozen, state_of(driver.cache))
    driver.check(keyframes=2)

    frozen[2].zero_()
    twin.check(keyframes=2)
    with pytest.raises(AssertionError, match="empty"):
        twin.cache.fill(*frozen)


# -- strength --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.25, 0.5, 2.0, 4.0])
@torch.no_grad()
def test_strength_multiplies_attention_weight(strength: float):
    """Against an explicit softmax: keyframes get `strength` times the weight, then all weights
    are divided by their sum."""
    driver = Driver()
    driver.step(2)
    driver.plan(3)
    driver.arrange()
    view = driver.cache.view(2, 2, strength=strength)
    query = torch.randn(BATCH, 5, HEADS, SIZE, generator=driver.draw)
    for keys, values, mask in call(view, driver.cache, driver.new(2), [2.0, 3.0]):
        assert mask is not None
        weights = torch.einsum("bqnd,bknd->bnqk", query, keys).div(SIZE**0.5).exp()
        weights[..., : 2 * ROWS * COLUMNS] *= strength
        weights = weights / weights.sum(dim=-1, keepdim=True)
        expected = torch.einsum("bnqk,bknd->bqnd", weights, values)
        assert (sdpa(query, keys, values, mask) - expected).abs().max() < 1e-5


@torch.no_grad()
def test_strength_is_of_the_chunk_alone():
    """Keyframes denoised along with a chunk see each other as ever: what is planned does not
    depend on how strongly it is followed."""
    driver = Driver()
    driver.step(2)
    driver.arrange()
    view = driver.cache.view(2, 2, write_keyframes=True, strength=3.0)
    size = ROWS * COLUMNS
    for _, _, mask in call(view, driver.cache, driver.new(4), [2.0, 3.0, 5.0, 8.0]):
        assert mask is not None and mask.shape == (1, 1, 4 * size, 6 * size)
        assert torch.all(mask[..., : 2 * size, : 2 * size] == math.log(3.0))
        assert not mask[..., : 2 * size, 2 * size :].any() and not mask[..., 2 * size :, :].any()


@torch.no_grad()
def test_no_mask_without_need():
    """Strength 1, or no keyframe in sight, gives no mask: attention keeps its fast kernels."""
    driver = Driver()
    driver.step(2)
    driver.plan(2)
    driver.arrange()
    for keyframes, strength in ((2, 1.0), (0, 3.0)):
        view = driver.cache.view(2, keyframes, strength=strength)
        for _, _, mask in call(view, driver.cache, driver.new(2), [2.0, 3.0]):
            assert mask is None
