"""Law 7: noise depends on seed, kind, chunk and pass, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sneakpeek_core.noise import seeded_noise
from sneakpeek_core.recording import keep_journal
from sneakpeek_core.settings import SamplerSettings
from sneakpeek_core.stream import VideoStream
from sneakpeek_core.vae.streaming import StreamingDecoder
from tests.laws import continued, rollout_of, small_stream, vae
from tests.small import (
    CELLS,
    GUIDANCE,
    JOINT,
    SIZE,
    THREE,
    latents_of,
    model,
    settings,
    start,
    steps,
    stream,
)


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
