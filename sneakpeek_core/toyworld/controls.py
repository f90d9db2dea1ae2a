"""Controls of an evaluation: does the video follow the text, an edit, a picture, and nothing else?

Each returns plain numbers over videos. Where they compare, they compare the same scenes and noise.
What the VAE alone loses is one of them: no video can be better than its reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..assembly import Parts
from ..guidance import FutureGuidance
from ..settings import SamplerSettings
from ..vae.streaming import decode_video, encode_video
from .evaluation import BATCH, Grid
from .render import render
from .rollouts import encode_step_ends, roll_out, schedule_of, stream_of
from .scene import Move, Scene, make_scene, other_move
from .score import mean_and_error, paired, score, shape_accuracy

Number = tuple[float, float]  # mean and standard error over videos


@dataclass(frozen=True, kw_only=True)
class Shuffled:
    """Step success against the steps as they were told, and against them in another order."""

    videos: int
    told: Number
    shuffled: Number


@dataclass(frozen=True, kw_only=True)
class Edited:
    """A coming step was replaced while the one before it ran.

    `success` of the new step, `old_success` of what it replaced (on the unedited stream), and the
    share of videos whose chunks from before the edit are the unedited stream's, bit for bit.
    """

    videos: int
    success: Number
    old_success: Number
    chunks_kept: float


@dataclass(frozen=True, kw_only=True)
class Goals:
    """Steps that say "somewhere else": how far the object ends from where a goal image shows it.

    In pixels, without the picture and with it; `gain` is the paired difference.
    """

    videos: int
    unguided_px: Number
    given_px: Number
    gain_px: Number


@dataclass(frozen=True, kw_only=True)
class Reconstructed:
    """Rendered videos through the VAE and back: PSNR over all frames, shapes that are recognised.

    `standing` objects are looked at on step ends, `carried` ones while they are carried.
    """

    videos: int
    psnr_db: Number
    step_success: Number
    persistence: Number
    standing: float
    carried: float


def reconstructed(parts: Parts, scenes: Sequence[Scene]) -> Reconstructed:
    """Encode and decode the truth, and score it."""
    psnr, scores, videos = [], [], []
    for batch in _batches(scenes):
        truth = torch.stack([render(scene) for scene in batch]).to(parts.model.device)
        with torch.no_grad():
            made = decode_video(parts.vae, encode_video(parts.vae, truth)).float()
        errors = (made - truth).square().mean((1, 2, 3, 4)).tolist()
        psnr += [-10 * math.log10(error) for error in errors]
        scores += [score(scene, video) for scene, video in zip(batch, made.cpu(), strict=True)]
        videos += list(made.cpu())
    standing, carried = shape_accuracy(scenes, videos)
    return Reconstructed(
        videos=len(psnr),
        psnr_db=mean_and_error(psnr),
        step_success=mean_and_error([one.step_success for one in scores]),
        persistence=mean_and_error([one.persistence for one in scores]),
        standing=standing,
        carried=carried,
    )


def shuffled_texts(parts: Parts, settings: SamplerSettings, scenes: Sequence[Scene]) -> Shuffled:
    """Score videos against their own steps moved on by one: a score that is earned collapses."""
    told, shuffled = [], []
    for batch in _batches(scenes):
        made = roll_out(parts, stream_of(parts, batch, settings))
        for scene, frames in zip(batch, made.frames_BFHWC, strict=True):
            moved_on = replace(scene, moves=(*scene.moves[1:], scene.moves[0]))
            told.append(score(scene, frames.float() / 255).step_success)
            shuffled.append(score(moved_on, frames.float() / 255).step_success)
    return Shuffled(videos=len(told), told=mean_and_error(told), shuffled=mean_and_error(shuffled))


def editable(grid: Grid) -> list[tuple[Scene, Move]]:
    """Return as many scenes of three steps as the grid has videos, with another second step each.

    `ValueError` if the tables are too full, or the objects too few, to find them.
    """
    found = []
    for seed in range(grid.first_scene, grid.first_scene + 20 * grid.videos):
        scene = make_scene(seed, 3, tier=grid.tier, objects=grid.objects)
        move = other_move(scene, 1)
        if move is not None:
            found.append((scene, move))
        if len(found) == grid.videos:
            return found
    raise ValueError(
        f"{grid.objects} objects leave no other second step to edit in; use 3 with --controls"
    )


def edited_step(
    parts: Parts, settings: SamplerSettings, pairs: Sequence[tuple[Scene, Move]]
) -> Edited:
    """Replace the second step's text while the first is being made, and score what happens."""
    success, old_success, kept = [], [], 0
    for batch in _batches(pairs):
        originals = [scene for scene, _ in batch]
        changed = [_changed(scene, move) for scene, move in batch]
        plain = roll_out(parts, stream_of(parts, originals, settings))
        stream = stream_of(parts, originals, settings)
        first = stream.chunk(1)  # chunk 0 is the start picture
        assert first is not None
        _, *coming = schedule_of(parts, changed).steps  # the first is the stream's own: begun
        edit = replace(stream.schedule, steps=(stream.schedule.steps[0], *coming))
        landed = stream.edit(edit)
        made = roll_out(parts, stream)
        assert landed.state == "landed", landed
        before = first.first + first.latents_BCFHW.shape[2]
        for row, (scene, new) in enumerate(zip(originals, changed, strict=True)):
            same = torch.equal(
                made.latents_BCFHW[row, :, :before], plain.latents_BCFHW[row, :, :before]
            )
            kept += same
            success.append(_second_step(new, made.frames_BFHWC[row]))
            old_success.append(_second_step(scene, plain.frames_BFHWC[row]))
    return Edited(
        videos=len(success),
        success=mean_and_error(success),
        old_success=mean_and_error(old_success),
        chunks_kept=kept / len(success),
    )


def open_ended(grid: Grid) -> list[Scene]:
    """Return a scene of one step that does not say where to, for every video of the grid."""
    seeds = range(grid.first_scene, grid.first_scene + grid.videos)
    return [
        make_scene(seed, 1, tier=grid.tier, objects=grid.objects, open_ended=1.0) for seed in seeds
    ]


def goal_images(parts: Parts, settings: SamplerSettings, scenes: Sequence[Scene]) -> Goals:
    """Compare videos of `open_ended` scenes, without and with a picture of the end."""
    guidance = settings.guidance or FutureGuidance()
    ways = {
        "unguided": replace(settings, guidance=None),
        "given": replace(settings, guidance=replace(guidance, mode="given")),
    }
    errors: dict[str, list[float]] = {way: [] for way in ways}
    for batch in _batches(scenes):
        goals = encode_step_ends(parts, batch)
        for way, own in ways.items():
            stream = stream_of(parts, batch, own, goals if way == "given" else None)
            made = roll_out(parts, stream)
            for scene, frames in zip(batch, made.frames_BFHWC, strict=True):
                errors[way].append(score(scene, frames.float() / 255).steps[0].moved_error_px)
    return Goals(
        videos=len(scenes),
        unguided_px=mean_and_error(errors["unguided"]),
        given_px=mean_and_error(errors["given"]),
        gain_px=paired(errors["unguided"], errors["given"]),
    )


def _changed(scene: Scene, move: Move) -> Scene:
    """Return the scene with another second step; what follows it stays as it was told."""
    return replace(scene, moves=(scene.moves[0], move, *scene.moves[2:]))


def _second_step(scene: Scene, frames_FHWC: Tensor) -> float:
    two = replace(scene, moves=scene.moves[:2])
    return float(score(two, frames_FHWC[: two.frames].float() / 255).steps[1].success)


def _batches(items: Sequence) -> list[Sequence]:
    return [items[first : first + BATCH] for first in range(0, len(items), BATCH)]
