"""Noise levels. sigma is 1 for pure noise and 0 for clean latents, a Python float throughout.

The network is told `1000 * sigma`, never rounded (937.5 stays 937.5). Every list here falls
strictly and ends in 0.0. Source: Self Forcing's flow-matching scheduler and its
`warp_denoising_step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TRAIN_STEPS = 1000  # timestep = TRAIN_STEPS * sigma


def shifted(sigma: float, shift: float) -> float:
    """Return `sigma` (0 to 1) moved towards noise: `k s / (1 + (k - 1) s)` for shift k > 0."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def few_step_sigmas(timesteps: Sequence[float], shift: float, warp: bool) -> tuple[float, ...]:
    """Return the sigmas of a list of timesteps (1000 to 0, falling), with a final 0.0.

    `warp` reads each entry as a step of the unshifted schedule and applies `shift` to it; without
    it the entries are final, and `shift` is not used. A trailing 0 in the list is accepted.
    """
    _check_shift(shift)
    listed = [float(t) / TRAIN_STEPS for t in timesteps]
    while listed and listed[-1] == 0.0:
        listed.pop()
    falls = all(a > b for a, b in pairwise(listed))
    if not listed or not falls or listed[0] > 1.0 or listed[-1] < 0.0:
        raise ValueError(
            f"timesteps {list(timesteps)} must fall strictly within 1000 to 0, for example "
            "1000, 750, 500, 250"
        )
    return (*(shifted(s, shift) if warp else s for s in listed), 0.0)


def uniform_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """Return `steps` + 1 shifted sigmas, evenly spaced before the shift, from 1.0 to 0.0."""
    _check_shift(shift)
    if not 1 <= steps <= TRAIN_STEPS:
        raise ValueError(f"steps {steps} must be 1 to {TRAIN_STEPS}; use 50 for undistilled models")
    return tuple(shifted(1.0 - i / steps, shift) for i in range(steps + 1))


def renoise(denoised: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """Return `denoised` with fresh noise at `sigma`: `(1 - sigma) x0 + sigma eps`, same shape."""
    return (1.0 - sigma) * denoised + sigma * noise


def _check_shift(shift: float) -> None:
    if not 0.0 < shift < float("inf"):
        raise ValueError(f"shift {shift} must be above 0; Self Forcing models use 5")
