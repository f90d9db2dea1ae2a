"""The laws of the design (section 5): what holds however a video is made, kept or interrupted.

Law 4, streaming decode equals whole decode, is in test_vae.py.
"""

from __future__ import annotations

import math
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import av
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sneakpeek_core import video
from sneakpeek_core.cache import CacheSpec, Keyframe, KVCache
from sneakpeek_core.conditioning import Conditioner
from sneakpeek_core.denoiser import Branch, Denoiser
from sneakpeek_core.frames import FrameChunk, FrameCursor, Recorder
from sneakpeek_core.frozen import WARM_LATENTS, FrozenCache
from sneakpeek_core.journal import Journal, read
from sneakpeek_core.latent_store import LatentStore
from sneakpeek_core.model.forward import Host, TextRun, text_layers, velocity
from sneakpeek_core.model.initial import random_transformer, random_vae
from sneakpeek_core.model.parallel import Frame, MaskedExtend, frame_mask
from sneakpeek_core.model.rope import Rope, rope_for, rotate
from sneakpeek_core.mp4 import probe
from sneakpeek_core.noise import NoiseSource, seeded_noise
from sneakpeek_core.policy import CachePolicy
from sneakpeek_core.recording import keep_journal, resume
from sneakpeek_core.records import Record
from sneakpeek_core.sampler import Rollout
from sneakpeek_core.schedule import Schedule, Timeline
from sneakpeek_core.settings import SamplerSettings
from sneakpeek_core.shapes import frames_of
from sneakpeek_core.stream import Chunk, Model, VideoStream, start_chunks
from sneakpeek_core.vae.streaming import StreamingDecoder
from sneakpeek_core.vae.wan import WanVAE
from sneakpeek_core.video import VideoWriter
from tests.small import (
    CONFIG,
    GUIDANCE,
    RELATIVE,
    SIGMAS,
    SIZE,
    TEXT_DIM,
    conditioner,
    encode,
    latents_of,
    negative,
    settings,
    small_model,
    start,
    steps,
    stream,
)

ROOT = Path(__file__).parents[1]
CELLS = SIZE // 8  # latent cells each way
FPS = 16.0
JOINT = replace(GUIDANCE, mode="joint")


@cache
def model() -> Model:
    return small_model()


@cache
def vae() -> WanVAE:
    return random_vae(dim=8, seed=0).eval().requires_grad_(False)


def small_stream(
    options: SamplerSettings | None = None, schedule: Schedule | None = None, image: bool = True
) -> VideoStream:
    return stream(schedule, options, model=model(), image=image)


def continued(
    frozen: FrozenCache, options: SamplerSettings | None = None, more: Schedule | None = None
) -> VideoStream:
    options = options or frozen.settings
    return VideoStream.continue_from(frozen, model(), conditioner(), options, more)


def rollout_of(source: VideoStream, noise: NoiseSource | None = None) -> Rollout:
    """A sampler with the settings of a stream, to be driven by hand."""
    caches = [KVCache(source.cache_spec) for _ in range(2 if source.settings.cfg > 1 else 1)]
    return Rollout(source.model.denoiser, caches, source.settings, (CELLS, CELLS), noise=noise)


# -- law 1 -----------------------------------------------------------------------------------------

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


# -- law 2 -----------------------------------------------------------------------------------------

THREE = ("[1s] lift it", "[1s] turn it", "[1s] put it down")  # 5, 9 and 13 latent frames
OTHER_END = (*THREE[:2], "[1s] throw it far away")


def goal(seed: int) -> Tensor:
    return torch.randn(1, 16, 1, CELLS, CELLS, generator=torch.Generator().manual_seed(seed))


def with_goals(schedule: Schedule, *indices: int) -> Schedule:
    return replace(
        schedule,
        steps=tuple(
            replace(step, goal=goal(i)) if i in indices else step
            for i, step in enumerate(schedule.steps)
        ),
    )


# name -> guidance, schedule
FUTURES = {
    "planned": (GUIDANCE, steps(*THREE)),
    "joint": (JOINT, steps(*THREE)),
    "given": (replace(GUIDANCE, mode="given"), with_goals(steps(*THREE), 1, 2)),
    "planned and given": (GUIDANCE, with_goals(steps(*THREE), 1)),
    "joint and given": (JOINT, with_goals(steps(*THREE), 1)),
    "other texts to come": (GUIDANCE, steps(*OTHER_END)),
    "strong": (replace(GUIDANCE, strength=3.0), steps(*THREE)),
    "weak and joint": (replace(JOINT, strength=0.3), steps(*THREE)),
    "one keyframe": (replace(GUIDANCE, count=1), steps(*THREE)),
    "four keyframes": (replace(GUIDANCE, count=4, place="every", every=3), steps(*THREE)),
    "noisy keyframes": (replace(GUIDANCE, context_sigma=0.4), steps(*THREE)),
    "often refreshed": (replace(GUIDANCE, refresh=1), steps(*THREE)),
    "first pass only": (replace(JOINT, first_passes=1), steps(*THREE)),
}
LAYOUTS = {
    "relative": RELATIVE,
    "absolute": CachePolicy(sink=1, window=4),
    "all": CachePolicy(),
}


@torch.no_grad()
def forced(
    options: SamplerSettings, schedule: Schedule, given: Tensor
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Commit given latents chunk by chunk; return the past after each, and what was made beside.

    Every chunk is made before the given one is committed, so that the future region is in use.
    """
    source = small_stream(options, schedule)
    rollout = rollout_of(source)
    pasts, made = [], []
    for part in start_chunks(given, options.chunk):
        if rollout.frontier:
            made.append(rollout.make(source.conditioning))
        rollout.commit(part, source.conditioning)
        pasts.append([])
        for kv in rollout.caches:
            first = len(kv.future)
            pasts[-1] += [part[:, :, first:].clone() for part in kv.contents()]
    return pasts, made


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("future", FUTURES)
def test_the_past_does_not_depend_on_the_future(future: str, layout: str):
    """Law 2: raw keys and values of held frames are the same, bit for bit, under any future."""
    given = start(frames=9)  # the two first steps: their texts are the same in all futures
    plain = settings(policy=LAYOUTS[layout], guidance=None)
    guidance, schedule = FUTURES[future]
    expected, unguided = forced(plain, steps(*THREE), given)
    pasts, guided = forced(replace(plain, guidance=guidance), schedule, given)

    assert [len(past) for past in pasts] == [2] * 5
    for past, wanted in zip(pasts, expected, strict=True):
        for part, other in zip(past, wanted, strict=True):
            assert torch.equal(part, other)
    # Guidance is not a no-op: what is made beside is not what is made without it.
    assert not any(torch.equal(a, b) for a, b in zip(guided, unguided, strict=True))


def test_the_past_of_both_branches_does_not_depend_on_the_future():
    """Law 2 holds for the negative text's cache too."""
    given = start(frames=9)
    plain = settings(cfg=2.0, guidance=None)
    expected, _ = forced(plain, steps(*THREE), given)
    pasts, _ = forced(replace(plain, guidance=JOINT), steps(*OTHER_END), given)
    assert [len(past) for past in pasts] == [4] * 5
    for past, wanted in zip(pasts, expected, strict=True):
        assert all(torch.equal(part, other) for part, other in zip(past, wanted, strict=True))


def test_every_setting_of_the_future_changes_the_video():
    """No two futures give the same chunks (else law 2 would be tested on nothing)."""
    given = start(frames=9)
    made = {
        name: torch.cat(forced(settings(guidance=guidance), schedule, given)[1], dim=2)
        for name, (guidance, schedule) in FUTURES.items()
    }
    names = list(made)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert not torch.equal(made[name], made[other]), (name, other)


@torch.no_grad()
def test_a_coming_step_acts_through_keyframes_only():
    """Editing a coming step changes the next chunk if there are new keyframes, and only then."""

    def next_chunk(guidance, edited: bool, version: int) -> Tensor:
        source = small_stream(settings(guidance=guidance), steps(*THREE))
        rollout = rollout_of(source)
        before = source.conditioning
        for part in start_chunks(start(frames=5), 2):
            if rollout.frontier:
                rollout.make(before)
            rollout.commit(part, before)
        rollout.make(before)  # keyframes are planned
        after = conditioner().prepare(steps(*OTHER_END), version) if edited else before
        return rollout.make(after)

    for guidance in (None, replace(GUIDANCE, mode="given")):  # no keyframes
        assert torch.equal(next_chunk(guidance, True, 1), next_chunk(guidance, False, 0))
    for guidance in (GUIDANCE, JOINT):
        assert not torch.equal(next_chunk(guidance, True, 1), next_chunk(guidance, False, 0))
    # The keyframes of the old text are kept while nobody says that the schedule has changed.
    assert torch.equal(next_chunk(GUIDANCE, True, 0), next_chunk(GUIDANCE, False, 0))


# -- law 3 -----------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One call of the sequential loop, and what its frames are in the parallel one."""

    frames: list[Frame]
    x_BCFHW: Tensor
    sigmas_BF: Tensor
    flow: Tensor


BATCH = 2
FRAMES = 9
STEP_ENDS = (4, 12)  # a chunk of two straddles no boundary, one of three does
PARALLEL_CASES = {
    "all, chunk 2": (CachePolicy(), 2),
    "window, chunk 2": (CachePolicy(window=4), 2),
    "sink and window, chunk 2": (CachePolicy(sink=1, window=4), 2),
    "sink and window, chunk 1": (CachePolicy(sink=2, window=3), 1),
    "sink and window, chunk 3": (CachePolicy(sink=1, window=5), 3),
}


def trainable() -> Denoiser:
    return Denoiser(random_transformer(CONFIG, 0), text_len=CONFIG.text_len)


def row_texts() -> list[Tensor]:
    """A text per step [B, L, text_dim]: other words in every row."""
    rng = torch.Generator().manual_seed(4)
    return [torch.randn(BATCH, 5, TEXT_DIM, generator=rng) for _ in STEP_ENDS]


def text_at(texts: list[Tensor], frame: int) -> Tensor:
    return texts[0] if frame < STEP_ENDS[0] else texts[1]


@torch.no_grad()
def sequential(
    denoiser: Denoiser, policy: CachePolicy, chunk: int, joint: bool
) -> tuple[list[Call], dict[int, frozenset[int]]]:
    """Run the cached loop over random latents; return its calls, and what each chunk could see.

    The start image is a chunk alone. Planned keyframes are made anew at chunks 1 and 3, first
    from noise, then as guides near their context sigma; joint ones go along with every chunk.
    """
    spec = CacheSpec(
        layers=CONFIG.layers, heads=CONFIG.heads, head_dim=128, rows=2, columns=2,
        past=policy.capacity(FRAMES), future=2, batch=BATCH,
    )  # fmt: skip
    kv, rng, texts = KVCache(spec), torch.Generator().manual_seed(5), row_texts()
    calls: list[Call] = []
    kept: dict[int, frozenset[int]] = {}

    def run(frames: list[Frame], view, low: float, high: float) -> None:
        x = torch.randn(BATCH, 16, len(frames), CELLS, CELLS, generator=rng)
        sigmas = low + (high - low) * torch.rand(BATCH, len(frames), generator=rng)
        rope = kv.rope([float(frame.frame) for frame in frames])
        branch = Branch([text_at(texts, frame.frame) for frame in frames], view)
        calls.append(Call(frames, x, sigmas, denoiser.flow(x, sigmas, rope, [branch])))

    plan = -1
    for number, frames in enumerate([range(1), *ranges(1, FRAMES, chunk)]):
        begin = frames.start
        room = begin if policy.window is None else policy.window - chunk
        kept[number] = frozenset(f for f in range(begin) if f < policy.sink or f >= begin - room)
        past = [float(f) for f in kv.frames]
        ahead = [begin + 4, begin + 9]
        opened = [Frame("open", f, number, number if joint else plan) for f in frames]
        if number and joint:
            kv.arrange(past, [])
            future = [Frame("future", f, number, number) for f in ahead]
            run(opened + future, kv.view(len(frames), 2, write_keyframes=True), 0.3, 1.0)
        elif number:
            if number in (1, 3):
                kv.drop_plan()
                kv.arrange(past, [])
                for low, high in ((0.5, 1.0), (0.0, 0.2)):
                    plan += 1
                    future = [Frame("future", f, number, plan) for f in ahead]
                    run(future, kv.view(0, 2, write_keyframes=True, keep=True), low, high)
                kv.commit_plan([Keyframe(f, 0, 0.0, "predicted", False, 0) for f in ahead])
                opened = [frame._replace(plan=plan) for frame in opened]
            kv.arrange(past, [float(key.frame) for key in kv.future])
            run(opened, kv.view(len(frames), 2), 0.3, 1.0)
        kv.arrange(past, [float(key.frame) for key in kv.future])
        clean = [Frame("clean", f, number) for f in frames]
        run(clean, kv.view(len(frames), keep=True), 0.0, 0.0)
        kv.commit(frames, policy, chunk)
    return calls, kept


def ranges(first: int, stop: int, size: int) -> list[range]:
    return [range(begin, min(begin + size, stop)) for begin in range(first, stop, size)]


def parallel(denoiser: Denoiser, calls: list[Call], kept, joint: bool) -> Tensor:
    """All the calls in one masked forward."""
    frames = [frame for call in calls for frame in call.frames]
    rope = rope_for([float(frame.frame) for frame in frames], 2, 2, head_dim=128)
    texts = row_texts()
    extend = MaskedExtend(frame_mask(frames, kept, joint=joint), 4)
    branch = Branch([text_at(texts, frame.frame) for frame in frames], extend)
    x = torch.cat([call.x_BCFHW for call in calls], dim=2)
    sigmas = torch.cat([call.sigmas_BF for call in calls], dim=1)
    return denoiser.flow(x, sigmas, rope, [branch])


@pytest.mark.parametrize("joint", [False, True], ids=["planned", "joint"])
@pytest.mark.parametrize("case", PARALLEL_CASES)
@torch.no_grad()
def test_the_parallel_forward_is_the_sequential_one(case: str, joint: bool):
    """Law 3: the masked forward of training equals the cached loop, kind of frame by kind."""
    denoiser = trainable()
    calls, kept = sequential(denoiser, *PARALLEL_CASES[case], joint)
    assert {frame.kind for call in calls for frame in call.frames} == {"clean", "open", "future"}
    flow = parallel(denoiser, calls, kept, joint)
    at = 0
    for call in calls:
        part = flow[:, :, at : at + len(call.frames)]
        torch.testing.assert_close(part, call.flow, rtol=0, atol=1e-5)
        at += len(call.frames)
    assert at == flow.shape[2]


class Spied(Rollout):
    """A rollout that keeps its passes: (chunk, frames, noisy latents, sigmas, clean latents)."""

    def __init__(self, like: Rollout):
        super().__init__(like.denoiser, like.caches, like.settings, like.latent_size)
        self.seen: list[tuple[int, list[int], Tensor, list[float], Tensor]] = []

    def _call(self, conditioning, frames, rope, view, given=None):
        call = super()._call(conditioning, frames, rope, view, given)
        object.__setattr__(call, "numbers", list(frames))
        return call

    def _pass(self, call, x, sigma):
        clean = super()._pass(call, x, sigma)
        self.seen.append((self.chunk, vars(call)["numbers"], x, call.sigmas(sigma), clean))
        return clean


@pytest.mark.parametrize("mode", ["planned", "joint"])
@torch.no_grad()
def test_the_parallel_forward_is_the_rollout(mode: str):
    """Law 3 for the sampler itself: every pass it makes, side by side in one masked call."""
    guidance = replace(GUIDANCE, mode=mode, place="every", every=4, context_sigma=0.15)
    options = settings(policy=CachePolicy(sink=1, window=4), guidance=guidance, sigmas=(0.9, 0.0))
    source = small_stream(options, with_goals(steps(*THREE), 1))
    conditioning = source.conditioning
    rollout = Spied(rollout_of(source))
    rollout.commit(start(), conditioning)
    while rollout.frontier < 13:
        rollout.commit(rollout.make(conditioning), conditioning)

    plan, frames, kept = -1, [], {}
    for chunk, numbers, _, sigmas, _ in rollout.seen:
        begin = max(0, 2 * chunk - 1)  # chunks begin at odd frames, keyframes are at multiples of 4
        kept[chunk] = frozenset(f for f in range(begin) if f < 1 or f >= begin - 2)
        if numbers[0] != begin:  # noisy keyframes and then guides: sets of their own
            plan += 1
            frames += [Frame("future", number, chunk, plan) for number in numbers]
        elif sigmas[0] == 0:
            frames += [Frame("clean", number, chunk) for number in numbers]
        else:
            plan += mode == "joint"
            kinds = ("open", "open", "future", "future")
            frames += [Frame(k, n, chunk, plan) for k, n in zip(kinds, numbers, strict=False)]
    x = torch.cat([x for _, _, x, _, _ in rollout.seen], dim=2)
    sigmas = torch.tensor([sigma for _, _, _, sigmas, _ in rollout.seen for sigma in sigmas])
    expected = torch.cat([clean for *_, clean in rollout.seen], dim=2)
    extend = MaskedExtend(frame_mask(frames, kept, joint=mode == "joint"), 4)
    branch = Branch([conditioning.text_of(frame.frame) for frame in frames], extend)
    rope = rope_for([float(frame.frame) for frame in frames], 2, 2, head_dim=128)
    clean = model().denoiser(x, sigmas[None], rope, [branch])
    assert {frame.kind for frame in frames} == {"clean", "open", "future"}
    torch.testing.assert_close(clean, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("joint", [False, True], ids=["planned", "joint"])
def test_the_parallel_forward_trains_every_parameter(joint: bool):
    """The gradients of the masked forward are finite, and every parameter gets one."""
    denoiser = trainable()
    calls, kept = sequential(denoiser, CachePolicy(sink=1, window=4), 2, joint)
    parallel(denoiser, calls, kept, joint).pow(2).mean().backward()
    check_gradients(denoiser)


def check_gradients(denoiser: Denoiser) -> None:
    for name, parameter in denoiser.tree.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().amax() > 0, name


@pytest.mark.parametrize("guidance", [None, GUIDANCE, JOINT], ids=["off", "planned", "joint"])
def test_the_cached_loop_is_the_same_under_autograd(guidance):
    """Training runs the sampler's own code: with gradients it makes the same latents and cache."""
    denoiser = trainable()
    options = settings(guidance=guidance)
    source = stream(None, options, model=Model(denoiser=denoiser, fingerprint="training"))

    def run(grad: bool) -> tuple[list[Tensor], list[Tensor]]:
        rollout, made = rollout_of(source), []
        with torch.set_grad_enabled(grad):
            rollout.commit(start(), source.conditioning)
            for _ in range(3):
                made.append(rollout.make(source.conditioning))
                rollout.commit(made[-1].detach(), source.conditioning)
        return made, [part.detach() for part in rollout.caches[0].contents()]

    plain, plain_cache = run(grad=False)
    made, kv = run(grad=True)
    for a, b in zip((*made, *kv), (*plain, *plain_cache), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert all(part.requires_grad for part in made)
    torch.cat(made, dim=2).pow(2).mean().backward()
    check_gradients(denoiser)


# -- law 5 -----------------------------------------------------------------------------------------

SAVED_CASES = {
    "planned": settings(),
    "joint": settings(guidance=JOINT),
    "cfg": settings(cfg=3.0),
    "batch": settings(seeds=(3, 2**63 + 11)),
    "off, absolute": settings(guidance=None, policy=CachePolicy(sink=1, window=4)),
}
SAVED_AFTER = (1, 3, 5)  # chunks


def in_new_process(function: Callable[..., None], *arguments: object) -> subprocess.Popen[str]:
    """Start a function of this module in a fresh interpreter."""
    code = f"import sys; from tests.test_laws import *; {function.__name__}(*sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def continue_all(folder: str) -> None:
    """Load every cache of a folder and go on to the end, without any text encoder."""
    for path in sorted(Path(folder).glob("*.cache")):
        frozen = FrozenCache.load(path)
        source = VideoStream.continue_from(frozen, model(), Conditioner(fps=FPS), frozen.settings)
        save_file({"latents": latents_of(source)}, path.with_suffix(".latents"))


def test_a_saved_cache_goes_on_in_a_new_process(tmp_path: Path):
    """Law 5: N+M chunks = N chunks, freeze, save, load in a new process, M chunks, bit for bit."""
    expected = {}
    for name, options in SAVED_CASES.items():
        whole = [chunk.latents_BCFHW for chunk in small_stream(options)]
        assert len(whole) == 7
        for chunks in SAVED_AFTER:
            source = small_stream(options)
            source.chunk(chunks - 1)
            key = f"{name} {chunks}"
            source.freeze().save(tmp_path / f"{key}.cache")
            expected[key] = torch.cat(whole[chunks:], dim=2)
    with in_new_process(continue_all, tmp_path) as child:
        pass
    assert child.returncode == 0
    for key, latents in expected.items():
        assert torch.equal(load_file(tmp_path / f"{key}.latents")["latents"], latents), key


def test_a_plan_outlives_the_freeze(tmp_path: Path):
    """Keyframes planned before a freeze are in force after it, and are not planned again."""
    source = small_stream()
    source.chunk(2)
    source.freeze().save(tmp_path / "x.cache")
    frozen = FrozenCache.load(tmp_path / "x.cache")
    assert [key.frame for key in frozen.future] == [6, 12] and frozen.planned_at == 1
    passes: list[int] = []
    after = continued(frozen)
    after.before_pass = lambda: passes.append(0)
    after.chunk(0)
    assert len(passes) == len(SIGMAS) - 1
    assert after.rollout is not None
    assert after.rollout.caches[0].future == frozen.future
    assert after.rollout.planned_at == 1


def record(folder: str, name: str, again: str = "") -> None:
    """Record a video with a journal beside it, announcing every chunk on stdout."""
    journal = Path(folder, "video.journal")
    if again:
        source = resume(journal, model(), Conditioner(fps=FPS))
    else:
        source = small_stream(schedule=steps(*LONG))
        keep_journal(source, journal)
    writer = VideoWriter(Path(folder, name), width=SIZE, height=SIZE, fps=FPS)
    recorder = Recorder(
        FrameCursor(source, StreamingDecoder(vae())), writer,
        lambda made: print(made.chunk.number, flush=True),
    )  # fmt: skip
    while recorder.step():
        pass
    writer.close()
    save_file({"latents": latents_of(source)}, Path(folder, "latents"))


LONG = ("[2s] lift it", "[2s] turn it", "[2s] put it down")  # 25 latent frames, 13 chunks


def test_a_killed_recording_plays_and_goes_on(tmp_path: Path):
    """Law 5, by journal: SIGKILL at any chunk leaves a video that plays up to the last announced
    one, and a fresh process, itself killed once, ends with the same latents."""
    expected = latents_of(small_stream(schedule=steps(*LONG)))
    rng = random.Random()
    at_least = 0
    for attempt, again in enumerate(("", "again")):
        last = rng.randrange(at_least + 1, at_least + 5)
        name = f"{attempt}.mp4"
        with in_new_process(record, tmp_path, name, again) as child:
            assert child.stdout is not None
            announced = [int(child.stdout.readline()) for _ in range(last + 1)]
            child.send_signal(signal.SIGKILL)
            announced += [int(line) for line in child.stdout.read().splitlines()]
        assert child.returncode == -signal.SIGKILL, (attempt, last)
        assert announced == list(range(len(announced))), (attempt, last)
        assert decodable_frames(tmp_path / name) >= frames_of(1 + 2 * announced[-1])
        records, _ = read(tmp_path / "video.journal")
        assert len(records) >= 2 + announced[-1], "an announced chunk is not in the journal"
        at_least = announced[-1]
    with in_new_process(record, tmp_path, "2.mp4", "again") as child:
        assert child.stdout is not None
        assert len(child.stdout.readlines()) == 13
    assert child.returncode == 0
    assert torch.equal(load_file(tmp_path / "latents")["latents"], expected)
    assert decodable_frames(tmp_path / "2.mp4") == frames_of(25)
    assert len(read(tmp_path / "video.journal")[0]) == 1 + 13


def decodable_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def psnr(a: Tensor, b: Tensor) -> float:
    error = (a.double() - b.double()).pow(2).mean().item()
    return 10 * math.log10(1 / error) if error else math.inf


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seam_of_a_continued_video(seed: int):
    """A continued stream's first frames are those of the uninterrupted video, above 40 dB."""
    decoder_vae = random_vae(dim=8, seed=seed).eval()
    whole = small_stream(schedule=steps(*LONG))
    frames = StreamingDecoder(decoder_vae).decode(latents_of(whole))[0]
    before = small_stream(schedule=steps(*LONG))
    before.chunk(9)
    frozen = before.freeze()
    assert frozen.frontier == 19 > WARM_LATENTS == frozen.warm.shape[2]

    def seam(warm: Tensor) -> float:
        source = continued(replace(frozen, warm=warm))
        made = FrameCursor(source, StreamingDecoder(decoder_vae)).pull()
        assert made is not None and made.first == frames_of(19)
        return psnr(made.frames_BFHWC[0], frames[made.first : made.first + 8])

    assert seam(frozen.warm) > 40
    assert seam(frozen.warm[:, :, -1:]) < 30  # it is the warming that does it


# -- law 6 -----------------------------------------------------------------------------------------


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


# -- law 7 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [None, GUIDANCE, JOINT], ids=["off", "planned", "joint"])
def test_any_chunk_can_be_made_again(guidance):
    """Law 7: a chunk made alone, from the boundary in front of it, is the same, bit for bit."""
    options = settings(guidance=guidance, context_sigma=0.1)
    source = small_stream(options, schedule=steps(*THREE))
    boundaries = []
    for _ in source:
        boundaries.append(source.freeze())
    chunks = list(source)[1:]
    assert len(chunks) == 6
    for frozen, expected in reversed(list(zip(boundaries[:-1], chunks, strict=True))):
        again = continued(frozen).chunk(0)
        assert again is not None and again.first == expected.first
        assert torch.equal(again.latents_BCFHW, expected.latents_BCFHW)


def test_noise_depends_on_seed_kind_chunk_and_pass_only():
    """Law 7: the same question has the same answer, in any order; any other has another one."""
    shape = (16, 2, CELLS, CELLS)
    questions = [(5, "chunk", 3, 1), (6, "chunk", 3, 1), (5, "keyframe", 3, 1)]
    questions += [(5, "chunk", 4, 1), (5, "chunk", 3, 2), (5, "chunk", 1, 3), (51, "chunk", 3, 1)]
    answers = [seeded_noise([s])(kind, chunk, i, shape) for s, kind, chunk, i in questions]
    for (s, kind, chunk, i), answer in reversed(list(zip(questions, answers, strict=True))):
        assert torch.equal(seeded_noise([9, s])(kind, chunk, i, shape)[1:], answer)
    for i, answer in enumerate(answers):
        assert abs(answer.mean().item()) < 0.2 and abs(answer.std().item() - 1) < 0.2
        assert not any(torch.equal(answer, other) for other in answers[:i])


@pytest.mark.parametrize("guidance", [GUIDANCE, JOINT], ids=["planned", "joint"])
def test_a_row_of_a_batch_is_the_same_seed_alone(guidance):
    """Law 7: rows of a batch do not know of each other."""
    both = latents_of(small_stream(settings(seeds=(3, 8), guidance=guidance)))
    for row, seed in enumerate((3, 8)):
        options = settings(seeds=(seed,), guidance=guidance)
        source = stream(None, options, model=model())
        alone = latents_of(with_start(source, options, row))
        torch.testing.assert_close(both[row : row + 1], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=0.1)


def with_start(source: VideoStream, options: SamplerSettings, row: int) -> VideoStream:
    """The same stream with one row of a batch's start."""
    return VideoStream(
        source.model, source.conditioner, source.schedule, options,
        width=SIZE, height=SIZE, start=start(batch=2)[row : row + 1],
    )  # fmt: skip


@torch.no_grad()
def test_a_chunks_noise_does_not_depend_on_keyframes():
    """Law 7: a chunk is drawn the same noise whatever keyframes are denoised along with it."""

    def drawn(guidance) -> dict[tuple[int, int], Tensor]:
        source = small_stream(settings(guidance=guidance))
        seen: dict[tuple[int, int], Tensor] = {}

        def noise(kind: str, chunk: int, index: int, shape: Sequence[int]) -> Tensor:
            answer = seeded_noise((0,))(kind, chunk, index, shape)
            if kind == "chunk":
                seen[chunk, index] = answer
            return answer

        rollout = rollout_of(source, noise)
        rollout.commit(start(), source.conditioning)
        for _ in range(2):
            rollout.commit(rollout.make(source.conditioning), source.conditioning)
        return seen

    plain = drawn(None)
    assert set(plain) == {(chunk, index) for chunk in (1, 2) for index in (0, 1)}
    for guidance in (GUIDANCE, JOINT, replace(JOINT, count=1), replace(JOINT, first_passes=1)):
        seen = drawn(guidance)
        assert seen.keys() == plain.keys()
        assert all(torch.equal(seen[key], plain[key]) for key in plain)


def test_the_global_random_state_is_neither_used_nor_changed(tmp_path: Path):
    """Law 7: what else draws random numbers in the process has no part in it."""
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        source = small_stream(settings(context_sigma=0.1))
        keep_journal(source, tmp_path / "x.journal")
        frames = [StreamingDecoder(vae()).decode(chunk.latents_BCFHW) for chunk in source]
        source.close()
        source.freeze().save(tmp_path / "x.cache")
        assert torch.equal(torch.get_rng_state(), before)
        results.append((latents_of(source), torch.cat(frames, dim=1)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# -- law 8 -----------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """As a host interrupts: an exception that `except Exception` does not see."""


ERRORS = (RuntimeError("broken"), KeyboardInterrupt(), Interrupted())


class Trip:
    """Raises once, at its n-th call; counts from 1, and never at 0."""

    def __init__(self, at: int, error: BaseException | None = None):
        self.at = at
        self.calls = 0
        self.error = error or Interrupted()

    def __call__(self, *_: object) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise self.error


class Recording:
    """A stream, decoded and written to a file, that can be stepped on after any exception."""

    def __init__(self, folder: Path, options: SamplerSettings):
        self.stream = small_stream(options)
        self.seen: list[FrameChunk] = []
        self.path = folder / f"{len(list(folder.iterdir()))}.mp4"
        self.writer = VideoWriter(self.path, width=SIZE, height=SIZE, fps=FPS)
        decoder = StreamingDecoder(vae(), latent_frames_per_step=1)
        cursor = FrameCursor(self.stream, decoder)
        self.recorder = Recorder(cursor, self.writer, self.seen.append)

    def finish(self) -> Recording:
        while self.recorder.step():
            pass
        return self

    def chunks(self) -> list[Chunk]:
        return [made.chunk for made in self.seen]

    def check_equals(self, other: Recording) -> None:
        """The same chunks, each once, the same frames and the same file."""
        assert [made.chunk.number for made in self.seen] == list(range(len(other.seen)))
        for mine, wanted in zip(self.seen, other.seen, strict=True):
            assert mine.first == wanted.first
            assert torch.equal(mine.chunk.latents_BCFHW, wanted.chunk.latents_BCFHW)
            assert torch.equal(mine.frames_BFHWC, wanted.frames_BFHWC)
        assert probe(self.path).frames == self.stream.timeline.frames == 49
        assert self.path.read_bytes() == other.path.read_bytes()


class Undisturbed(NamedTuple):
    recording: Recording
    boundaries: list[FrozenCache]  # after each chunk
    passes: int


MODES = {
    "planned": settings(),
    "joint": settings(guidance=JOINT),
    "refreshed": settings(guidance=replace(GUIDANCE, refresh=2)),
    "cfg": settings(cfg=2.0),
}
# Chunks of two passes and a context pass, the start image's and none behind the last chunk; a
# plan is two passes and one that writes it: at the start, when frame 6 is reached, at refreshes.
PASSES = {
    "planned": 6 * 3 + 2 * 3,
    "joint": 6 * 3,
    "refreshed": 6 * 3 + 4 * 3,
    "cfg": 6 * 3 + 2 * 3,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Undisturbed]:
    @cache
    def run(mode: str) -> Undisturbed:
        options = MODES[mode]
        recording = Recording(tmp_path_factory.mktemp("undisturbed"), options)
        count = Trip(0)
        recording.stream.before_pass = count
        recording.finish()
        source, boundaries = small_stream(options), []
        for _ in source:
            boundaries.append(source.freeze())
        return Undisturbed(recording, boundaries, count.calls)

    return run


def check_boundary(source: VideoStream, expected: Undisturbed) -> None:
    """After an exception the stream can be frozen at a boundary, and that goes on as it should.

    The keyframes in force may be newer than the boundary, or lost with an interrupted plan.
    """
    frozen, wanted = source.freeze(), expected.boundaries[len(source) - 1]
    assert (frozen.chunk, frozen.frontier, frozen.frames) == (
        wanted.chunk, wanted.frontier, wanted.frames,
    )  # fmt: skip
    same_plan = (frozen.future, frozen.planned_at) == (wanted.future, wanted.planned_at)
    skip = (0, 0) if same_plan else (len(frozen.future), len(wanted.future))
    for mine, other in zip(
        (*frozen.keys, *frozen.values), (*wanted.keys, *wanted.values), strict=True
    ):
        assert torch.equal(mine[:, :, skip[0] :], other[:, :, skip[1] :])
    assert torch.equal(frozen.warm, wanted.warm)
    if frozen.frontier < source.timeline.latent_frames:
        rest = [made.chunk.latents_BCFHW for made in expected.recording.seen[len(source) :]]
        assert torch.equal(latents_of(continued(frozen)), torch.cat(rest, dim=2))


def test_the_passes_of_a_run(undisturbed):
    """The parametrised tests below visit every pass."""
    for mode, passes in PASSES.items():
        assert undisturbed(mode).passes == passes
        assert not any(kv.isnan().any() for kv in undisturbed(mode).boundaries[-1].keys)


def check_goes_on(
    recording: Recording, expected: Undisturbed, error: BaseException, at: int
) -> None:
    """Run into an error, then on: the end is that of the undisturbed run.

    Every third time the stream is frozen in between, every fourth time it is a recording.
    """
    with pytest.raises(type(error)) as caught:
        recording.finish() if at % 4 == 0 else list(recording.stream)
    assert caught.value is error
    if at % 3 == 0:
        check_boundary(recording.stream, expected)
    if at % 4 == 0:
        recording.finish().check_equals(expected.recording)
        return
    made, wanted = list(recording.stream), expected.recording.chunks()
    assert [(a.number, a.first) for a in made] == [(b.number, b.first) for b in wanted]
    for a, b in zip(made, wanted, strict=True):
        assert torch.equal(a.latents_BCFHW, b.latents_BCFHW)


@pytest.mark.parametrize(
    ("mode", "at"),
    [(mode, at) for mode in ("planned", "joint") for at in range(1, PASSES[mode] + 1)]
    + [("refreshed", at) for at in range(1, PASSES["refreshed"] + 1, 4)],
)
def test_interrupt_before_any_pass(mode: str, at: int, undisturbed, tmp_path: Path):
    """Law 8: an interrupt before any pass (plan, keyframe write, chunk, context) costs nothing."""
    recording = Recording(tmp_path, MODES[mode])
    trip = recording.stream.before_pass = Trip(at)
    check_goes_on(recording, undisturbed(mode), trip.error, at)
    assert trip.calls <= PASSES[mode] + 3 + 1  # at most a plan is made again


@pytest.mark.parametrize(
    ("mode", "at"),
    [("planned", at) for at in range(1, PASSES["planned"] + 1)]
    + [("joint", at) for at in range(1, PASSES["joint"] + 1, 3)]
    + [("cfg", at) for at in range(1, 2 * PASSES["cfg"] + 1, 7)],  # two forwards a pass
)
def test_interrupt_in_a_layer(mode: str, at: int, undisturbed, tmp_path: Path):
    """Law 8: nor does an exception in the middle of a pass, when a layer has written already."""
    expected, error = undisturbed(mode), ERRORS[at % len(ERRORS)]
    layer = model().denoiser.tree.blocks[1].self_attn.norm_k
    hook = layer.register_forward_hook(Trip(at, error))
    try:
        check_goes_on(Recording(tmp_path, MODES[mode]), expected, error, at)
    finally:
        hook.remove()


def test_interrupt_again_and_again(undisturbed, tmp_path: Path):
    """Law 8: a stream that is interrupted before every second pass still gets to its end."""
    expected = undisturbed("refreshed")
    recording = Recording(tmp_path, MODES["refreshed"])
    rng, interrupts, calls = random.Random(0), 0, 0

    def before_pass() -> None:
        nonlocal calls
        calls += 1
        if calls > 2 and rng.random() < 0.5:  # a plan alone has three passes
            calls = 0
            raise Interrupted

    recording.stream.before_pass = before_pass
    while True:
        try:
            recording.finish()
            break
        except Interrupted:
            interrupts += 1
            assert interrupts < 300
    assert interrupts > 5
    recording.check_equals(expected.recording)


@pytest.mark.parametrize("at", [1, 2, 3, 6, 7, 12, 13])  # one call a latent frame
def test_exception_in_decode(at: int, undisturbed, tmp_path: Path):
    """Law 8: an exception inside the VAE leaves the decoder at the boundary of the chunk."""
    recording = Recording(tmp_path, settings())
    error = ERRORS[at % len(ERRORS)]
    hook = vae().decoder.upsamples[5].register_forward_hook(Trip(at, error))
    try:
        with pytest.raises(type(error)):
            recording.finish()
    finally:
        hook.remove()
    check_boundary(recording.stream, undisturbed("planned"))
    recording.finish().check_equals(undisturbed("planned").recording)


def test_exception_in_the_warming_of_a_decoder():
    """Law 8: a continued stream's decoder is warmed once, also when that is interrupted."""
    source = small_stream()
    source.chunk(2)
    frozen = source.freeze()

    def first_frames(*trips: int) -> Tensor:
        decoder = StreamingDecoder(vae(), latent_frames_per_step=1)
        cursor = FrameCursor(continued(frozen), decoder)
        for at in trips:
            hook = vae().decoder.upsamples[5].register_forward_hook(Trip(at))
            try:
                with pytest.raises(Interrupted):
                    cursor.pull()
            finally:
                hook.remove()
        made = cursor.pull()
        assert made is not None
        return made.frames_BFHWC

    # Five latents warm it, two are the chunk: in the warming, in the chunk, in both.
    expected = first_frames()
    for trips in ((1,), (5,), (6,), (7,), (3, 7, 1, 2)):
        assert torch.equal(first_frames(*trips), expected), trips


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("at", [1, 4])
def test_exception_in_encode(
    at: int, error: BaseException, undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Law 8: an exception while a chunk is encoded leaves the file at the boundary before it."""
    trip, real = Trip(at, error), VideoWriter._packets

    def packets(writer: VideoWriter, *arguments):
        made = real(writer, *arguments)
        trip()
        return made

    monkeypatch.setattr(VideoWriter, "_packets", packets)
    recording = Recording(tmp_path, settings())
    with pytest.raises(type(error)):
        recording.finish()
    assert recording.writer.chunks == len(recording.seen) == at - 1
    check_boundary(recording.stream, undisturbed("planned"))
    recording.finish().check_equals(undisturbed("planned").recording)


@pytest.mark.parametrize("at", [1, 2, 5, 12])
def test_full_disk_under_the_video(
    at: int, undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Law 8: when only a part of a chunk fits the disk, the file ends with the chunk before."""
    trip, real = Trip(at, OSError(28, "No space left on device")), video._write_all

    def write_all(file, content: bytes) -> None:
        trip.calls += 1
        if trip.calls == trip.at:
            real(file, content[: len(content) // 2])
            raise trip.error
        real(file, content)

    monkeypatch.setattr(video, "_write_all", write_all)
    recording = Recording(tmp_path, settings())
    with pytest.raises(OSError, match="No space"):
        recording.finish()
    if recording.path.exists():
        assert decodable_frames(recording.path) == frames_of(2 * len(recording.seen) - 1)
    recording.finish().check_equals(undisturbed("planned").recording)


def test_exception_in_the_announcement(undisturbed, tmp_path: Path):
    """Law 8: a chunk whose announcement fails is on disk, and is not written again."""
    recording = Recording(tmp_path, settings())
    announce, trip = recording.recorder.on_chunk, Trip(3)

    def announced(made: FrameChunk) -> None:
        announce(made)
        trip()

    recording.recorder.on_chunk = announced
    with pytest.raises(Interrupted):
        recording.finish()
    assert recording.writer.chunks == 3
    recording.finish().check_equals(undisturbed("planned").recording)


@pytest.mark.parametrize("at", [1, 2, 4, 6])
def test_full_disk_under_the_journal(at: int, undisturbed, tmp_path: Path):
    """Law 8: a journal record is written whole or not at all; the chunk is made once more, and
    neither the journal nor the video holds it twice."""
    folder = tmp_path / "videos"
    folder.mkdir()
    recording = Recording(folder, settings())
    path = tmp_path / "x.journal"
    keep_journal(recording.stream, path)
    size = path.stat().st_size
    if at > 1:
        recording.stream.chunk(at - 1)
        size = path.stat().st_size
    with file_size_limit(size + 1000), pytest.raises(OSError, match="File too large"):
        recording.finish()
    assert len(recording.stream) == at
    assert path.stat().st_size == size
    check_boundary(recording.stream, undisturbed("planned"))
    recording.finish().check_equals(undisturbed("planned").recording)
    recording.stream.close()
    again = resume(path, model(), conditioner())
    assert len(again) == 7
    assert torch.equal(latents_of(again), latents_of(undisturbed("planned").recording.stream))


class file_size_limit:
    """Files cannot grow beyond `size` bytes: a real full disk for whoever writes one."""

    def __init__(self, size: int):
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self._size = size

    def __enter__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._size, self._limits[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)


@pytest.mark.parametrize("room", [0, 5, 50, 9000, 20000])
def test_a_journal_record_is_whole_or_absent(room: int, tmp_path: Path):
    """Law 8: an append that fails half-way, wherever, changes nothing, and can be repeated."""
    path = tmp_path / "x.journal"
    one = Record("journal-chunk", {"n": 1}, {"latents": torch.randn(6000)})
    with Journal.create(path, Record("journal-start", {}, {})) as journal:
        size = path.stat().st_size
        with file_size_limit(size + room), pytest.raises(OSError, match="File too large"):
            journal.append(one)
        assert path.stat().st_size == size
        journal.append(one)
    assert [record.kind for record in read(path)[0]] == ["journal-start", "journal-chunk"]


def test_full_disk_under_the_spilled_latents(
    undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Law 8: when old latents cannot be spilled, the chunk at hand is not half remembered."""
    expected = latents_of(undisturbed("planned").recording.stream)
    for at in range(1, 6):
        trip, real = Trip(at, OSError(28, "No space left on device")), LatentStore._spill

        def spill(store: LatentStore, index: int, trip=trip, real=real) -> None:
            trip()
            real(store, index)

        source = small_stream()
        source._latents._ram_bytes = 5000  # two chunks
        keep_journal(source, tmp_path / "x.journal")
        with monkeypatch.context() as patch:
            patch.setattr(LatentStore, "_spill", spill)
            with pytest.raises(OSError, match="No space"):
                latents_of(source)
            made = [*source]
        source.close()
        assert [chunk.first for chunk in made] == [0, 1, 3, 5, 7, 9, 11]
        assert torch.equal(torch.cat([chunk.latents_BCFHW for chunk in made], dim=2), expected)
        again = resume(tmp_path / "x.journal", model(), conditioner())
        again.close()
        assert torch.equal(latents_of(again), expected)


def pull_all(source: VideoStream, caught: list[BaseException]) -> None:
    try:
        latents_of(source)
    except BaseException as error:
        caught.append(error)


def test_exception_in_a_worker_thread(undisturbed, tmp_path: Path):
    """Law 8: a thread that dies while it pulls leaves the stream to others, at a boundary."""
    expected = undisturbed("planned")
    for at in (2, 9, 15):
        recording = Recording(tmp_path, settings())
        recording.stream.before_pass = Trip(at)
        caught: list[BaseException] = []
        worker = threading.Thread(target=pull_all, args=(recording.stream, caught))
        worker.start()
        worker.join()
        assert [type(error) for error in caught] == [Interrupted]
        check_boundary(recording.stream, expected)
        recording.finish().check_equals(expected.recording)


def test_interrupt_in_a_replay(undisturbed, tmp_path: Path):
    """Law 8: the context passes that a resumed stream replays can be interrupted as well."""
    expected = latents_of(undisturbed("planned").recording.stream)
    source = small_stream()
    keep_journal(source, tmp_path / "x.journal")
    source.chunk(5)
    source.close()
    journal = (tmp_path / "x.journal").read_bytes()
    # Six context passes, and a plan of three in front of the fifth.
    for at in range(1, 10):
        (tmp_path / "y.journal").write_bytes(journal)
        again = resume(tmp_path / "y.journal", model(), conditioner())
        again.before_pass = Trip(at)
        assert len(again) == 6
        with pytest.raises(Interrupted):
            latents_of(again)
        assert torch.equal(latents_of(again), expected), at
        again.close()


def test_interrupt_before_anything_was_made():
    """Law 8: a stream that never got to its first chunk can be frozen and continued too."""
    expected = latents_of(small_stream(image=False))
    source = small_stream(image=False)
    source.before_pass = Trip(1)
    with pytest.raises(Interrupted):
        source.chunk(0)
    frozen = source.freeze()
    assert (frozen.chunk, frozen.frontier, frozen.frames) == (0, 0, ())
    after = continued(frozen)
    assert FrameCursor(after, StreamingDecoder(vae())).pull() is not None
    assert torch.equal(latents_of(after), expected)
