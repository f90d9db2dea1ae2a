"""What every latent frame is told: the text of its own step, and the goal it works towards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .schedule import Schedule, Timeline

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
