"""A small cache advanced as the sampler does, beside a list in plain Python of what went in.

Keys and values are [B, S, N, D]: batch, tokens, heads, head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sneakpeek_core.cache import CacheSpec, CacheView, Keyframe, KVCache
from sneakpeek_core.policy import CachePolicy

LAYERS, HEADS, SIZE, BATCH = 2, 2, 16, 2
ROWS, COLUMNS = 2, 3
BANDS = (4, 2, 2)  # of the 8 pairs of a head of 16
SPEC = CacheSpec(
    layers=LAYERS, heads=HEADS, head_dim=SIZE, rows=ROWS, columns=COLUMNS,
    past=8, future=3, batch=BATCH,
)  # fmt: skip
ALL = CachePolicy()


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


def key_of(frame: int, version: int = 0) -> Keyframe:
    return Keyframe(frame, 0, 0.0, "predicted", False, version)


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
        self.cache.commit(self.cache.settle(numbers, self.policy, next_chunk or size))
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
