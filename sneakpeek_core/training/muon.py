"""Muon: momentum, made orthogonal, for every weight that acts as a matrix.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the step size of Liu et al. 2025
(arXiv 2502.16982) so that AdamW's learning rates carry over. Unlike `torch.optim.Muon` it takes
convolutions (out_channels x the rest) and computes in fp32 where processors have no bf16.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Newton-Schulz of degree five, its slope at zero as steep as it converges (Jordan et al.)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
RMS = 0.2  # of an update before the learning rate, as AdamW's is in practice


class Muon(torch.optim.Optimizer):
    """For parameters of two or more axes; give the others to AdamW.

    `dtype` is what updates are made orthogonal in: bf16 does no harm, and saves time where there is
    hardware for it.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 3e-3,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self._dtype = dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(f"Muon takes matrices, got shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step; parameters without a gradient stay."""
        assert closure is None
        for group in self.param_groups:
            # Weights of one shape are one batch: a transformer has many, and each alone is small.
            alike: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
                ahead = parameter.grad.add(average, alpha=group["momentum"])  # Nesterov
                alike[tuple(parameter.shape)].append((parameter, ahead.flatten(1)))
            for shape, pairs in alike.items():
                updates = orthogonal(torch.stack([ahead for _, ahead in pairs]), self._dtype)
                size = RMS * max(updates.shape[1:]) ** 0.5
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view(shape), alpha=-group["lr"] * size)


def orthogonal(matrices_BMN: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return matrices with the same singular vectors and singular values near 1."""
    x = matrices_BMN
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices_BMN.dtype)
