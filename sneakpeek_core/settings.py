"""How chunks are sampled: one frozen value, checked when it is made. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .guidance import FutureGuidance
from .policy import CachePolicy
from .schedule import is_number, is_whole

SOLVERS = ("renoise", "euler")


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """How chunks are sampled.

    `chunk` in latent frames. `sigmas` descend and end in 0; `first_sigmas` replace them for the
    chunk at latent frame 0, which a video with a start does not generate. `solver`: *renoise*
    draws fresh noise before every pass (few-step distilled models), *euler* follows the flow
    (undistilled ones). `cfg` above 1 needs a second cache. `context_sigma` is the noise level of
    the context pass. `span` is the number of latent frames the model was trained on: keyframes
    stay within it. `seeds`: one per row of the batch.
    """

    sigmas: tuple[float, ...]
    chunk: int = 3
    first_sigmas: tuple[float, ...] | None = None
    solver: str = "renoise"
    cfg: float = 1.0
    context_sigma: float = 0.0
    span: int = 21
    seeds: tuple[int, ...] = (0,)
    policy: CachePolicy = field(default_factory=CachePolicy)
    guidance: FutureGuidance | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.chunk) or not 1 <= self.chunk <= 64:
            raise ValueError(f"chunk {self.chunk!r} is not allowed; use 1 to 64 latent frames")
        for sigmas in (self.sigmas, self.first_sigmas):
            if sigmas is not None:
                check_sigmas(sigmas)
        if self.solver not in SOLVERS:
            raise ValueError(f"solver {self.solver!r} is unknown; use {' or '.join(SOLVERS)}")
        if not is_number(self.cfg) or not 1.0 <= self.cfg <= 30.0:
            raise ValueError(f"cfg {self.cfg!r} is not allowed; use 1 (one branch) to 30")
        if not is_number(self.context_sigma) or not 0 <= self.context_sigma < 1:
            raise ValueError(f"context sigma {self.context_sigma!r} is not allowed; use 0 up to 1")
        if not is_whole(self.span) or self.span < 0:
            raise ValueError(f"span {self.span!r} is not allowed; use 21, as most models")
        if not self.seeds:
            raise ValueError("there are no seeds; give one for each row of the batch")
        for seed in self.seeds:
            if not is_whole(seed) or not 0 <= seed < 2**64:
                raise ValueError(f"seed {seed!r} is not allowed; use 0 to {2**64 - 1}")
        self.policy.check(self.chunk)
        self._check_span()

    @property
    def keyframes(self) -> int:
        """Slots the future region needs."""
        return self.guidance.count if self.guidance and self.guidance.strength > 0 else 0

    def _check_span(self) -> None:
        policy = self.policy
        if not self.keyframes or policy.window is None:
            return
        room = self.span - policy.sink - policy.window
        if room < 1:
            raise ValueError(
                f"sink {policy.sink} + window {policy.window} leave no room for keyframes in the "
                f"{self.span} latent frames the model was trained on; use a window of "
                f"{self.span - policy.sink - self.chunk} or less, or guidance off"
            )

    def check_length(self, latent_frames: int) -> None:
        """Raise `ValueError` if guidance would leave the trained span before the video ends."""
        policy = self.policy
        pinned = policy.window is None or (policy.positions == "absolute" and policy.sink > 0)
        if self.keyframes and pinned and latent_frames > self.span:
            raise ValueError(
                f"{latent_frames} latent frames with window "
                f"{policy.window or 'all'} and positions {policy.positions!r} go beyond the "
                f"{self.span} the model was trained on, where keyframes decay; use positions "
                f"'relative' with a window of {self.span - policy.sink - self.chunk} or less, or "
                "guidance off"
            )


def check_sigmas(sigmas: Sequence[float]) -> None:
    """Raise `ValueError` unless sigmas descend strictly from at most 1 and end in 0."""
    numbers = all(map(is_number, sigmas))
    text = ", ".join(f"{s:g}" if isinstance(s, (int, float)) else repr(s) for s in sigmas)
    if len(sigmas) < 2 or sigmas[-1] != 0:
        raise ValueError(f"sigmas [{text}] do not end in 0; add it")
    if not numbers or not 0 < sigmas[0] <= 1 or not all(a > b for a, b in pairwise(sigmas)):
        raise ValueError(f"sigmas [{text}] do not descend from 1 at most; sort them")
