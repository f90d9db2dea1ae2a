"""What every latent frame is told: the text of its own step, and the goal it works towards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .schedule import Schedule, Timeline
from .shapes import LATENT_CHANNELS

# Texts in, embeddings out: one [L, text_dim] per text, unpadded.
Encode = Callable[[list[str]], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """One version of a schedule, ready for the sampler.

    `texts` [B or 1, L, text_dim] and `goals` [B or 1, C, 1, H, W] (clean latents, or None) are
    per step. Rows of a batch share the timeline; their texts and goals may differ.
    """

    schedule: Schedule
    timeline: Timeline
    texts: tuple[Tensor, ...]
    goals: tuple[Tensor | None, ...]
    negative: Tensor | None = None
    version: int = 0

    def text_of(self, latent_frame: int) -> Tensor:
        return self.texts[self.timeline.step_of(latent_frame)]

    @property
    def goal_steps(self) -> frozenset[int]:
        return frozenset(i for i, goal in enumerate(self.goals) if goal is not None)


def trimmed(text_BLC: Tensor) -> Tensor:
    """Drop trailing all-zero tokens: the model pads with the same zeros (and hosts pad early)."""
    used = text_BLC.abs().amax(dim=(0, 2)).nonzero()
    return text_BLC[:, : int(used[-1]) + 1] if len(used) else text_BLC[:, :1]


def check_conditioning(
    conditioning: Conditioning, batch: int, text_dim: int | None, latent_size: tuple[int, int]
) -> None:
    """Raise `ValueError` unless all texts and goals are ones that the model can be given.

    `text_dim` None: not known. `latent_size` is (height, width) in latent cells.
    """
    rows = "1" if batch == 1 else f"1 or {batch}"
    texts = {f"the text of step {i}": t for i, t in enumerate(conditioning.texts, 1)}
    if conditioning.negative is not None:
        texts["the negative text"] = conditioning.negative
    for name, text in texts.items():
        fits = text.dim() == 3 and len(text) in (1, batch) and text.shape[1] > 0
        if not fits or text_dim not in (None, text.shape[2]):
            raise ValueError(
                f"{name} is embedded as {tuple(text.shape)}, not [{rows}, tokens, "
                f"{text_dim or 'text_dim'}]; use the text encoder that belongs to the model"
            )
        _check_numbers(name, text)
    for number, goal in enumerate(conditioning.goals, 1):
        if goal is None:
            continue
        expected = (LATENT_CHANNELS, 1, *latent_size)
        if goal.dim() != 5 or len(goal) not in (1, batch) or goal.shape[1:] != expected:
            raise ValueError(
                f"the goal of step {number} is {tuple(goal.shape)}, not [{rows}, "
                f"{', '.join(map(str, expected))}]; encode a picture of the video's size"
            )
        _check_numbers(f"the goal of step {number}", goal)


def _check_numbers(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
        raise ValueError(f"{name} is not all finite fractions; encode it again")


@dataclass
class Conditioner:
    """Turns schedules into `Conditioning`, encoding each text and each goal once.

    `encode` may be None when every step brings its own `embeds`; `encode_goal` turns a step's
    goal into latents [B or 1, C, 1, H, W].
    """

    fps: float
    encode: Encode | None = None
    encode_goal: Callable[[object], Tensor] | None = None
    negative: Tensor | None = None
    known: dict[str, Tensor] = field(default_factory=dict)
    _goals: dict[int, tuple[object, Tensor]] = field(default_factory=dict)

    def prepare(self, schedule: Schedule, version: int = 0) -> Conditioning:
        """Return the conditioning of `schedule`; `ValueError` where a text cannot be encoded."""
        timeline = Timeline.of(schedule, self.fps)
        self._encode_new(schedule)
        return Conditioning(
            schedule=schedule,
            timeline=timeline,
            texts=tuple(self._text(schedule, i) for i in range(len(schedule.steps))),
            goals=tuple(self._goal(step.goal) for step in schedule.steps),
            negative=self.negative,
            version=version,
        )

    def _encode_new(self, schedule: Schedule) -> None:
        new: list[str] = []
        for index, step in enumerate(schedule.steps):
            prompt = schedule.prompt(index)
            if step.embeds is None and prompt not in self.known and prompt not in new:
                new.append(prompt)
        if not new:
            return
        if self.encode is None:
            raise ValueError(
                f"there is no text encoder for the text {new[0][:60]!r}; give one "
                "(--text-encoder), or steps that are encoded already"
            )
        with torch.no_grad():
            encoded = self.encode(new)
        for prompt, text in zip(new, encoded, strict=True):
            self.known[prompt] = trimmed(text.unsqueeze(0) if text.dim() == 2 else text)

    def _text(self, schedule: Schedule, index: int) -> Tensor:
        embeds = schedule.steps[index].embeds
        return self.known[schedule.prompt(index)] if embeds is None else embeds

    def _goal(self, goal: object) -> Tensor | None:
        if goal is None or (isinstance(goal, Tensor) and goal.dim() == 5):
            return goal  # nothing, or latents already
        if self.encode_goal is None:
            raise ValueError("a goal image needs a VAE to encode it; give one (--vae)")
        if id(goal) not in self._goals:
            self._goals[id(goal)] = (goal, self.encode_goal(goal))
        return self._goals[id(goal)][1]
