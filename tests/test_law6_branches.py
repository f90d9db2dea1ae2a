"""Law 6: continuations of one cache affect neither each other nor the cache."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from sneakpeek_core.frozen import FrozenCache
from tests.laws import LONG, continued, small_stream
from tests.small import JOINT, THREE, latents_of, settings, steps


def tensors_of(frozen: FrozenCache) -> list[Tensor]:
    """Copies of everything a frozen cache holds."""
    texts = (*frozen.conditioning.texts, frozen.conditioning.negative)
    parts = (*frozen.keys, *frozen.values, frozen.warm, *texts)
    return [part.clone() for part in parts if part is not None]


def test_continuations_are_independent():
    """Law 6: continuations of one cache affect neither each other nor the cache."""
    source = small_stream(settings(cfg=2.0), schedule=steps(*THREE))
    source.chunk(2)
    frozen = source.freeze()
    before = tensors_of(frozen)
    branches = {
        "the same": (settings(cfg=2.0), None),
        "other seed": (settings(cfg=2.0, seeds=(7,)), None),
        "more steps": (settings(cfg=2.0), steps("[1s] shake it", "[1s] drop it")),
        "other cfg": (settings(cfg=5.0), None),
        "other sigmas and guidance": (
            settings(cfg=2.0, sigmas=(1.0, 0.9, 0.5, 0.0), guidance=JOINT), None,
        ),
    }  # fmt: skip
    alone = {key: latents_of(continued(frozen, *branch)) for key, branch in branches.items()}
    streams = {key: continued(frozen, *branch) for key, branch in branches.items()}
    twin = continued(frozen)
    parts: dict[str, list[Tensor]] = {key: [] for key in branches}
    for index in range(9):
        twin.chunk(index)
        for key, branch in streams.items():
            if (chunk := branch.chunk(index)) is not None:
                parts[key].append(chunk.latents_BCFHW)
        if index == 1:
            streams["other seed"].freeze()

    for key, expected in alone.items():
        assert torch.equal(torch.cat(parts[key], dim=2), expected), key
    assert torch.equal(latents_of(twin), alone["the same"])
    assert torch.equal(alone["the same"], latents_of(source)[:, :, frozen.frontier :])
    assert not torch.equal(alone["other seed"], alone["the same"])
    assert not torch.equal(alone["other cfg"], alone["the same"])
    for part, other in zip(tensors_of(frozen), before, strict=True):
        assert torch.equal(part, other)


def test_continuations_can_run_side_by_side():
    """Law 6 in threads: two streams over one model, pulled at the same time."""
    source = small_stream(schedule=steps(*LONG))
    source.chunk(1)
    frozen = source.freeze()
    options = [settings(seeds=(seed,)) for seed in (0, 7)]
    expected = [latents_of(continued(frozen, each)) for each in options]
    streams = [continued(frozen, each) for each in options]
    made: dict[int, Tensor] = {}

    def pull(index: int) -> None:
        made[index] = latents_of(streams[index])

    threads = [threading.Thread(target=pull, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(made[index], expected[index]) for index in range(2))
