"""Law 2: what is held of the past does not depend on the future that guides it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sneakpeek_core.policy import CachePolicy
from sneakpeek_core.schedule import Schedule
from sneakpeek_core.settings import SamplerSettings
from sneakpeek_core.start import start_chunks
from tests.laws import rollout_of, small_stream, with_goals
from tests.small import GUIDANCE, JOINT, RELATIVE, THREE, conditioner, settings, start, steps

OTHER_END = (*THREE[:2], "[1s] throw it far away")
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
