"""The dual-region cache against a list of frames in plain Python."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sneakpeek_core import policy as policies
from sneakpeek_core.cache import CacheSpec, CacheView, Keyframe, KVCache
from sneakpeek_core.model.forward import sdpa
from sneakpeek_core.policy import CachePolicy, Policy
from sneakpeek_core.sampler import Rollout
from tests.small import CONFIG, conditioner, settings, small_model, start, steps, stream

LAYERS, HEADS, SIZE, BATCH = 2, 2, 16, 2
ROWS, COLUMNS = 2, 3
BANDS = (4, 2, 2)  # of the 8 pairs of a head of 16
SPEC = CacheSpec(
    layers=LAYERS, heads=HEADS, head_dim=SIZE, rows=ROWS, columns=COLUMNS,
    past=8, future=3, batch=BATCH,
)  # fmt: skip
ALL = CachePolicy()


# -- the reference ---------------------------------------------------------------------------------


class Made:
    """Random keys and values of one latent frame, [B, S, N, D] per layer."""

    def __init__(self, rng: torch.Generator, batch: int = BATCH):
        shape = (LAYERS, batch, ROWS * COLUMNS, HEADS, SIZE)
        self.keys = torch.randn(shape, generator=rng)
        self.values = torch.randn(shape, generator=rng)


def turned(keys_BSND: Tensor, position: float) -> Tensor:
    """Rotate one frame's keys by complex multiplication in float64."""
    angles = torch.zeros(ROWS * COLUMNS, 1, sum(BANDS), dtype=torch.float64)
    for token in range(ROWS * COLUMNS):
        places = (position, token // COLUMNS, token % COLUMNS)
        rates = [
            place * 10000.0 ** (-j / pairs)
            for place, pairs in zip(places, BANDS, strict=True)
            for j in range(pairs)
        ]
        angles[token, 0] = torch.tensor(rates, dtype=torch.float64)
    pairs = torch.view_as_complex(keys_BSND.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def call(view: CacheView, cache: KVCache, made: Sequence[Made], positions: Sequence[float]):
    """Run one pass over all layers; return (keys, values, mask) it attended to, per layer."""
    rope = cache.rope(positions)
    return [
        view(
            layer,
            torch.cat([frame.keys[layer] for frame in made], dim=1),
            torch.cat([frame.values[layer] for frame in made], dim=1),
            rope,
        )
        for layer in range(LAYERS)
    ]


def check_attended(attended, frames: Sequence[Made], positions: Sequence[float]) -> None:
    """The pass saw exactly these frames in this order, rotated to these positions."""
    for layer, (keys, values, mask) in enumerate(attended):
        assert mask is None
        expected = [turned(f.keys[layer], p) for f, p in zip(frames, positions, strict=True)]
        assert torch.equal(values, torch.cat([f.values[layer] for f in frames], dim=1))
        assert (keys - torch.cat(expected, dim=1)).abs().max() < 1e-5


@dataclass
class Reference:
    """The cache as a list: (frame number, keys and values), and the keyframes."""

    past: list[tuple[int, Made]] = field(default_factory=list)
    future: list[tuple[int, Made]] = field(default_factory=list)

    @property
    def numbers(self) -> list[int]:
        return [number for number, _ in self.past]


def key_of(frame: int, version: int = 0) -> Keyframe:
    return Keyframe(frame, 0, 0.0, "predicted", False, version)


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
        cache.commit(numbers, policy, chunk)
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


# -- helpers for the shorter tests -----------------------------------------------------------------


class Driver:
    """A cache that is advanced like the sampler does, with a list of what went in."""

    def __init__(self, spec: CacheSpec = SPEC, policy: CachePolicy = ALL, seed: int = 0):
        self.cache, self.policy = KVCache(spec), policy
        self.draw = torch.Generator().manual_seed(seed)
        self.made: list[Made] = []  # every frame there ever was
        self.planned: list[Made] = []

    def new(self, count: int) -> list[Made]:
        return [Made(self.draw, self.cache.spec.batch) for _ in range(count)]

    @property
    def positions(self) -> tuple[list[float], float]:
        past, first = self.policy.place(self.cache.frames, len(self.made))
        return list(past), first

    def arrange(self) -> None:
        past, first = self.positions
        ahead = [first + key.frame - len(self.made) for key in self.cache.future]
        self.cache.arrange(past, ahead)

    def plan(self, count: int) -> None:
        self.planned = self.new(count)
        first = self.positions[1]
        self.arrange()
        view = self.cache.view(0, count, write_keyframes=True, keep=True)
        call(view, self.cache, self.planned, [first + 5.0 + i for i in range(count)])
        self.cache.commit_plan([key_of(len(self.made) + 5 + i) for i in range(count)])

    def write(self, chunk: list[Made]) -> None:
        """The context pass, without its commit."""
        self.arrange()
        first = self.positions[1]
        at = [first + i for i in range(len(chunk))]
        call(self.cache.view(len(chunk), keep=True), self.cache, chunk, at)

    def step(self, size: int, next_chunk: int | None = None) -> None:
        chunk = self.new(size)
        self.write(chunk)
        numbers = range(len(self.made), len(self.made) + size)
        self.cache.commit(numbers, self.policy, next_chunk or size)
        self.made += chunk

    def check(self, keyframes: int = 0) -> None:
        """A pass over an open chunk of one sees the frames that are held, as they were made."""
        self.arrange()
        past, first = self.positions
        chunk = self.new(1)
        ahead = [first + key.frame - len(self.made) for key in self.cache.future]
        attended = call(self.cache.view(1, keyframes), self.cache, chunk, [first])
        shown = self.planned[len(self.planned) - keyframes :]
        frames = [*shown, *(self.made[f] for f in self.cache.frames), *chunk]
        check_attended(attended, frames, [*ahead[len(ahead) - keyframes :], *past, first])


def state_of(cache: KVCache) -> tuple:
    keys, values = cache.contents()
    return cache.frames, cache.future, keys.clone(), values.clone()


def same(one: tuple, other: tuple) -> bool:
    return one[:2] == other[:2] and all(map(torch.equal, one[2:], other[2:]))


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


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@torch.no_grad()
def test_commit_is_all_or_nothing(kind: type[BaseException], monkeypatch):
    """An exception in an eviction hook leaves the cache where it was; committing again works."""
    failing = [True]

    def hook(cache: KVCache, evicted: tuple[int, ...]) -> None:
        if failing[0]:
            raise kind

    keep = policies.sink_and_window
    monkeypatch.setitem(policies.POLICIES, "fragile", Policy(keep, hook))
    driver = Driver(policy=CachePolicy(sink=1, window=4, positions="relative", policy="fragile"))
    driver.step(2)
    before = state_of(driver.cache)
    chunk = driver.new(2)
    driver.write(chunk)
    with pytest.raises(kind):
        driver.cache.commit([2, 3], driver.policy, 2)
    assert same(before, state_of(driver.cache))
    driver.check()
    driver.write(chunk)
    failing[0] = False
    driver.cache.commit([2, 3], driver.policy, 2)
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

        def hook(cache: KVCache, evicted: tuple[int, ...]) -> None:
            calls[0] += 1
            if calls[0] == fail_at:
                raise RuntimeError("interrupted")

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


# -- policies from outside -------------------------------------------------------------------------


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

    def absorb(cache: KVCache, evicted: tuple[int, ...]) -> None:
        (sink,) = cache.slots([0])
        for slot in cache.slots(evicted):
            for stored in (cache.keys, cache.values):
                stored[:, :, sink].lerp_(stored[:, :, slot], share)
        cache.invalidate([sink])

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

    def look(cache: KVCache, evicted: tuple[int, ...]) -> None:
        for frame, slot in zip(evicted, cache.slots(evicted), strict=True):
            seen[frame] = cache.values[:, :, slot].clone()

    monkeypatch.setitem(policies.POLICIES, "newest", Policy(newest, look))
    driver = Driver(policy=CachePolicy(window=6, positions="relative", policy="newest"))
    for _ in range(3):
        driver.step(3)
    assert sorted(seen) == [1, 2, 3, 4, 5, 6, 7]
    for frame, values in seen.items():
        assert torch.equal(values, driver.made[frame].values)


# -- training --------------------------------------------------------------------------------------

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


def test_small_models_have_the_heads_of_wan():
    """The tests with a whole model use head size 128, the tests here a smaller one."""
    assert CONFIG.heads == 1
    assert SPEC.head_dim == SIZE == 2 * sum(BANDS)
