"""Videos of scenes from a model: many at once, through the stream that users get.

Rows of a batch are scenes with equally many steps; a row's noise is a function of its own seed, so
the same scene under other settings is a paired comparison. Frames are BFHWC uint8.

Legend: B batch (scenes), F frames, H height, W width, C channels; K steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..assembly import Parts
from ..conditioning import Conditioner
from ..denoiser import Branch, Denoiser
from ..model.rope import Rope
from ..schedule import Schedule, Step
from ..settings import SamplerSettings
from ..stream import VideoStream
from ..vae.streaming import StreamingDecoder, encode_image
from .motion import moments
from .render import render_moments
from .scene import FPS, FRAMES_PER_STEP, SIZE, STEP_SECONDS, Scene


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What came out: frames, the latents they were decoded from, and what it cost."""

    frames_BFHWC: Tensor
    latents_BCFHW: Tensor
    frame_passes: int  # latent frames sent through the transformer, for each video


def true_step_ends(scene: Scene) -> Tensor:
    """Return the truth at the start and at the end of every step, [1 + K, H, W, C] in [0, 1]."""
    frames = moments(scene)[::FRAMES_PER_STEP]
    return render_moments(scene, frames)


def encode_step_ends(parts: Parts, scenes: Sequence[Scene]) -> list[Tensor]:
    """Return each step's true end, every picture encoded alone: K tensors [B, C, 1, H, W].

    These are oracle keyframes, and what a user's goal images look like.
    """
    pictures = torch.stack([true_step_ends(scene)[1:] for scene in scenes])
    with torch.no_grad():
        return [
            encode_image(parts.vae, pictures[:, step].to(parts.model.device)).float().cpu()
            for step in range(pictures.shape[1])
        ]


def schedule_of(
    parts: Parts, scenes: Sequence[Scene], goals: Sequence[Tensor] | None = None
) -> Schedule:
    """Return the schedule of a batch: one step for all rows, with a text for each."""
    assert parts.encode is not None
    steps = []
    for number in range(len(scenes[0].moves)):
        sentences = [scene.sentences[number] for scene in scenes]
        embeds = parts.encode(sentences)
        # Zeros behind a shorter text are what the model pads with anyway.
        text = pad_sequence(embeds, batch_first=True)
        goal = None if goals is None else goals[number]
        steps.append(Step(text=sentences[0], seconds=STEP_SECONDS, embeds=text, goal=goal))
    return Schedule(tuple(steps))


def stream_of(
    parts: Parts,
    scenes: Sequence[Scene],
    settings: SamplerSettings,
    goals: Sequence[Tensor] | None = None,
) -> VideoStream:
    """Return the stream of a batch of scenes; a row's noise follows settings and its scene."""
    starts = torch.stack([true_step_ends(scene)[0] for scene in scenes])
    with torch.no_grad():
        start = encode_image(parts.vae, starts.to(parts.model.device)).float().cpu()
    seeds = tuple((settings.seeds[0] << 32) + scene.seed for scene in scenes)
    plain = parts.model.denoiser
    counting = _Counting(plain.tree, dtype=plain.dtype, text_len=plain.text_len, host=plain.host)
    return VideoStream(
        replace(parts.model, denoiser=counting),
        Conditioner(fps=FPS),
        schedule_of(parts, scenes, goals),
        replace(settings, seeds=seeds),
        width=SIZE,
        height=SIZE,
        start=start,
    )


def roll_out(parts: Parts, stream: VideoStream) -> Rollout:
    """Pull a stream of `stream_of` to its end and decode it."""
    decoder = StreamingDecoder(parts.vae)
    latents, frames = [], []
    for chunk in stream:
        latents.append(chunk.latents_BCFHW)
        decoded = decoder.decode(chunk.latents_BCFHW.to(parts.model.device))
        frames.append((decoded * 255).round().byte().cpu())
    stream.close()
    counting = stream.model.denoiser
    assert isinstance(counting, _Counting)
    return Rollout(
        frames_BFHWC=torch.cat(frames, 1),
        latents_BCFHW=torch.cat(latents, 2),
        frame_passes=counting.frame_passes,
    )


class _Counting(Denoiser):
    """A denoiser that counts the latent frames it is asked for: the compute of a rollout."""

    frame_passes = 0

    def flow(
        self,
        x_BCFHW: Tensor,
        sigmas_BF: Tensor,
        rope: Rope,
        branches: Sequence[Branch],
        cfg: float = 1.0,
    ) -> Tensor:
        self.frame_passes += x_BCFHW.shape[2]
        return super().flow(x_BCFHW, sigmas_BF, rope, branches, cfg)
