"""A model's own past in place of the true one, so that it learns to undo its errors.

Teacher forcing shows true pasts only. In the sampler the past is what the model made itself, and
what is a little wrong in one chunk grows in the next. Here a forward without gradients predicts all
frames of the sequences at once, from much noise; its errors are added to the past, and to guides,
and the next forward sees them. Each further pass compounds errors as a further chunk would. What is
learned stays the truth.

Passes in parallel over time: parallel scheduled sampling (Duckworth et al. 2019, arXiv:1906.04331).
Errors of predicted latents on clean ones: error recycling (Stable Video Infinity, Li et al. 2025,
arXiv:2510.09212), which keeps them in a bank instead.

Legend: as in `sequences`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .recipe import check_counts, check_shares
from .sequences import Batch


@dataclass(frozen=True, kw_only=True)
class OwnPastRecipe:
    """How often a past is the model's own. A pass takes a third of a step's time."""

    share: float = 0.0  # of sequences whose past is, and of plans whose guides are
    passes: int = 1  # forwards before the one that is learned from
    sigma: float = 0.9  # noise that frames are predicted from
    begin: float = 0.0  # share of the run before it: what predicts nothing yet teaches nothing

    def __post_init__(self) -> None:
        check_shares(self, "share", "begin")
        check_counts(self, "passes")
        if not 0 < self.sigma <= 1:
            raise ValueError(f"sigma {self.sigma} must be above 0 and at most 1; use 0.9")


@torch.no_grad()
def with_own_past(batch: Batch, recipe: OwnPastRecipe, flow_of: Callable[[Batch], Tensor]) -> Batch:
    """Return the batch with the model's errors on the frames that have a source.

    `flow_of` predicts the flow BCFHW of a batch.
    """
    sources_BF = batch.sources_BF
    if not (sources_BF >= 0).any():
        return batch
    predicted_BF = batch.weights_BF > 0
    levels_BF = torch.where(predicted_BF, recipe.sigma, batch.sigmas_BF)
    # x = clean + sigma * flow, so that another noise level is a step along the flow
    more = (levels_BF - batch.sigmas_BF)[:, None, :, None, None]
    noisy = batch.x_BCFHW + more * batch.flow_BCFHW
    signal = ((sources_BF >= 0) * (1 - batch.sigmas_BF))[:, None, :, None, None]
    index = sources_BF.clamp(min=0)[:, None, :, None, None].expand_as(batch.x_BCFHW)
    added = torch.zeros_like(batch.x_BCFHW)
    for _ in range(recipe.passes):
        flow = flow_of(batch._replace(x_BCFHW=noisy + added, sigmas_BF=levels_BF))
        errors = recipe.sigma * (batch.flow_BCFHW - flow.to(batch.flow_BCFHW.dtype))
        added = signal * errors.gather(2, index)
    return batch._replace(x_BCFHW=batch.x_BCFHW + added)
