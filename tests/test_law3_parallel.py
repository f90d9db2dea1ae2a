"""Law 3: one masked forward over all frames, as in training, is the cached loop."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sneakpeek_core.cache import CacheSpec, Keyframe, KVCache
from sneakpeek_core.denoiser import Branch, Denoiser
from sneakpeek_core.guidance import FutureGuidance
from sneakpeek_core.model.initial import random_transformer
from sneakpeek_core.model.parallel import Frame, MaskedExtend, frame_mask
from sneakpeek_core.model.rope import rope_for
from sneakpeek_core.policy import CachePolicy
from sneakpeek_core.sampler import Rollout
from sneakpeek_core.stream import Model
from sneakpeek_core.training.layout import LayoutRecipe, draw_layout
from tests.laws import rollout_of, small_stream, with_goals
from tests.small import (
    CELLS,
    CONFIG,
    GUIDANCE,
    JOINT,
    TEXT_DIM,
    THREE,
    model,
    settings,
    start,
    steps,
    stream,
)


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
        branch = Branch([text_at(texts, frame.frame) for frame in frames], view, {})
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
        kv.commit(kv.settle(frames, policy, chunk))
    return calls, kept


def ranges(first: int, stop: int, size: int) -> list[range]:
    return [range(begin, min(begin + size, stop)) for begin in range(first, stop, size)]


def parallel(denoiser: Denoiser, calls: list[Call], kept, joint: bool) -> Tensor:
    """All the calls in one masked forward."""
    frames = [frame for call in calls for frame in call.frames]
    rope = rope_for([float(frame.frame) for frame in frames], 2, 2, head_dim=128)
    texts = row_texts()
    extend = MaskedExtend(frame_mask(frames, kept, joint=joint), 4)
    branch = Branch([text_at(texts, frame.frame) for frame in frames], extend, {})
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
    branch = Branch([conditioning.text_of(frame.frame) for frame in frames], extend, {})
    rope = rope_for([float(frame.frame) for frame in frames], 2, 2, head_dim=128)
    clean = model().denoiser(x, sigmas[None], rope, [branch])
    assert {frame.kind for frame in frames} == {"clean", "open", "future"}
    torch.testing.assert_close(clean, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", ["absolute", "relative"])
@torch.no_grad()
def test_a_training_sequence_is_the_rollout(positions: str):
    """Law 3 for what stage 1 lays out: each pass of a rollout, put into its place there, is the
    same, with a window that leaves frames out and a start that is kept beside it."""
    policy = CachePolicy(sink=1, window=4, positions=positions)
    guidance = FutureGuidance(count=1, context_sigma=0.15)
    source = small_stream(
        settings(policy=policy, guidance=guidance, sigmas=(0.9, 0.0)), steps(*THREE)
    )
    conditioning = source.conditioning
    rollout = Spied(rollout_of(source))
    rollout.commit(start(), conditioning)
    while rollout.frontier < 13:
        rollout.commit(rollout.make(conditioning), conditioning)
    passes: dict[tuple[str, int], tuple[Tensor, float, Tensor]] = {}
    for chunk, numbers, x, sigmas, clean in rollout.seen:
        planning = chunk > 0 and len(numbers) == 1  # chunks are of two frames
        for i, (number, sigma) in enumerate(zip(numbers, sigmas, strict=True)):
            noisy, nearly_clean = ("target", "guide") if planning else ("open", "clean")
            role = noisy if sigma > 0.5 else nearly_clean
            passes[role, number] = (x[:, :, i, None], sigma, clean[:, :, i, None])

    recipe = LayoutRecipe(
        chunks=(2,), windows=(4,), windowed=1.0, sink=1.0, guided=1.0, horizons=(1,),
        reaches=(18,), late=0.0,
    )  # fmt: skip
    layout = draw_layout((5, 9, 13), recipe, random.Random(0), positions)
    assert {place.role for place in layout.places} == {"clean", "open", "target", "guide"}
    moved = [place.moved_to for place in layout.places if place.moved_to is not None]
    assert moved == ([] if positions == "absolute" else [2, 4, 6, 8])
    found = [passes.get((place.role, place.frame)) for place in layout.places]
    assert all(found)
    x, sigmas, expected = zip(*found, strict=True)
    extend = MaskedExtend(frame_mask(layout.frames, layout.kept), 4)
    branch = Branch([conditioning.text_of(place.frame) for place in layout.places], extend, {})
    rope = rope_for([float(place.position) for place in layout.places], 2, 2, head_dim=128)
    made = model().denoiser(torch.cat(x, 2), torch.tensor(sigmas)[None], rope, [branch])
    torch.testing.assert_close(made, torch.cat(expected, 2), rtol=0, atol=1e-5)


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
