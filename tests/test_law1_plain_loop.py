"""Law 1: with the future region off, a stream is the plain causal loop of Self-Forcing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from torch import Tensor

from sneakpeek_core.model.forward import Host, TextRun, text_layers, velocity
from sneakpeek_core.model.rope import Rope, rope_for, rotate
from sneakpeek_core.noise import seeded_noise
from sneakpeek_core.policy import CachePolicy
from sneakpeek_core.schedule import Schedule, Timeline
from sneakpeek_core.settings import SamplerSettings
from tests.laws import FPS, small_stream
from tests.small import (
    CELLS,
    CONFIG,
    GUIDANCE,
    TEXT_DIM,
    encode,
    latents_of,
    model,
    negative,
    settings,
    start,
    steps,
)

ALL = CachePolicy()
PLAIN_CASES = {
    "everything is kept": (ALL, 2, False, 1.0),
    "everything is kept, start image": (ALL, 2, True, 1.0),
    "chunk 1": (CachePolicy(window=3), 1, True, 1.0),
    "chunk 3": (CachePolicy(window=6), 3, False, 1.0),
    "chunk 3, window of an odd size": (CachePolicy(window=5), 3, True, 1.0),
    "window": (CachePolicy(window=4), 2, False, 1.0),
    "window of one chunk": (CachePolicy(window=2), 2, False, 1.0),
    "sink and window": (CachePolicy(sink=3, window=4), 2, False, 1.0),
    "sink, window, start image": (CachePolicy(sink=1, window=5), 2, True, 1.0),
    "relative": (CachePolicy(sink=1, window=4, positions="relative"), 2, True, 1.0),
    "relative, chunk 3": (CachePolicy(sink=2, window=4, positions="relative"), 3, False, 1.0),
    "relative, everything": (CachePolicy(positions="relative"), 1, False, 1.0),
    "cfg": (CachePolicy(sink=1, window=4), 2, True, 3.0),
    "cfg, relative, chunk 3": (CachePolicy(window=6, positions="relative"), 3, False, 2.5),
}


@pytest.mark.parametrize("case", PLAIN_CASES)
@torch.no_grad()
def test_future_off_is_the_plain_causal_loop(case: str):
    """Law 1: with the future region off, a stream is Self-Forcing's loop, bit for bit."""
    policy, chunk, image, cfg = PLAIN_CASES[case]
    schedule = steps("[1.5s] lift it", "[1.4s] put it down", "[1s] wait")
    options = settings(policy=policy, chunk=chunk, cfg=cfg, guidance=None)
    expected = naive_loop(schedule, options, start() if image else None)

    assert torch.equal(latents_of(small_stream(options, schedule, image)), expected)
    off = replace(options, guidance=replace(GUIDANCE, strength=0.0))
    assert torch.equal(latents_of(small_stream(off, schedule, image)), expected)


def naive_loop(schedule: Schedule, options: SamplerSettings, first: Tensor | None) -> Tensor:
    """Self-Forcing, steps 3.1 to 3.4, over a list of held frames: no storage, no regions.

    A held frame is its keys and values, [(k, v) per layer] per branch, as the context pass made
    them. Frames behind the sink leave the list when the next chunk opens.
    """
    policy, noise = options.policy, seeded_noise(options.seeds)
    timeline = Timeline.of(schedule, FPS)
    texts = [encode([schedule.prompt(i)])[0][None] for i in range(len(schedule.steps))]
    sink = max(policy.sink, 1) if first is not None else policy.sink
    held: list[tuple[int, list]] = []  # (frame, branches)
    made: list[Tensor] = []

    def call(x: Tensor, sigma: float, frames: Sequence[int]) -> tuple[Tensor, list]:
        """Return clean latents, and the frames' own keys and values."""
        numbers = [frame for frame, _ in held]
        if policy.positions == "relative":
            places = list(range(len(numbers) + len(frames)))
        else:
            places = [*numbers, *frames]
        levels = torch.full((len(x), len(frames)), sigma)
        flows, own = [], [[] for _ in frames]
        for branch in range(2 if options.cfg > 1 else 1):
            runs, at = [], 0
            for step, group in groupby(frames, key=lambda f: timeline.step_of(f)):
                size = len(list(group))
                text = negative() if branch else texts[step]
                padded = torch.zeros(1, CONFIG.text_len, TEXT_DIM)
                padded[:, : text.shape[1]] = text
                runs.append(TextRun(at, at + size, text_layers(model().denoiser.tree, padded)))
                at += size
            if branch:  # one text for all frames is one run
                runs = [TextRun(0, at, runs[0].layers)]
            layers: list[tuple[Tensor, Tensor]] = []

            def extend(
                layer: int, k: Tensor, v: Tensor, rope: Rope, branch=branch, layers=layers
            ) -> tuple[Tensor, Tensor, None]:
                layers.append((k, v))
                past = [kept[branch][layer] for _, kept in held]
                keys = torch.cat([*(pair[0] for pair in past), k], dim=1)
                values = torch.cat([*(pair[1] for pair in past), v], dim=1)
                turn = rope_for(places, CELLS // 2, CELLS // 2, head_dim=128)
                return rotate(keys, turn), values, None

            rope = rope_for(places[len(held) :], CELLS // 2, CELLS // 2, head_dim=128)
            flows.append(
                velocity(
                    model().denoiser.tree, x, levels * 1000, rope, runs, extend,
                    dtype=torch.float32, host=Host(),
                )
            )  # fmt: skip
            for index, frame in enumerate(own):
                cut = slice(4 * index, 4 * index + 4)  # 4 tokens a frame
                frame.append([(k[:, cut], v[:, cut]) for k, v in layers])
        flow = flows[0]
        if len(flows) > 1:
            flow = flows[1] + options.cfg * (flows[0] - flows[1])
        scale = levels[:, None, :, None, None].double()
        return (x.double() - scale * flow.double()).float(), own

    def context(latents: Tensor) -> None:
        begin = sum(part.shape[2] for part in made)
        frames = range(begin, begin + latents.shape[2])
        _, own = call(latents, 0.0, frames)
        held.extend(zip(frames, own, strict=True))
        made.append(latents)

    if first is not None:
        context(first)
    while (begin := sum(part.shape[2] for part in made)) < timeline.latent_frames:
        number, frames = len(made), range(begin, begin + options.chunk)
        while policy.window is not None and len(held) > sink + policy.window - options.chunk:
            del held[sink]
        shape = (16, options.chunk, CELLS, CELLS)
        x = noise("chunk", number, 0, shape)
        for index, (sigma, below) in enumerate(
            zip(options.sigmas[:-1], options.sigmas[1:], strict=True)
        ):
            x, _ = call(x, sigma, frames)
            if below > 0:
                fresh = noise("chunk", number, index + 1, shape)
                x = (1.0 - below) * x + below * fresh
        context(x[:, :, : timeline.latent_frames - begin])
    return torch.cat(made, dim=2)
