"""Muon: orthogonal updates, for matrices and convolutions, that get somewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sneakpeek_core.training.muon import RMS, Muon, orthogonal


def matrices(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-3), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("shape", [(3, 12, 12), (2, 8, 40), (2, 40, 8), (1, 1, 9)])
def test_updates_are_nearly_orthogonal(
    shape: tuple[int, int, int], dtype: torch.dtype, error: float
):
    """Against the SVD: the same singular vectors, every singular value near 1."""
    before = matrices(*shape)
    after = orthogonal(before, dtype)
    assert after.dtype == torch.float32
    u, s, vh = torch.linalg.svd(before, full_matrices=False)
    turned = u.mT @ after @ vh.mT
    values = turned.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.3 and values.max() < 1.3
    assert (turned - torch.diag_embed(values)).abs().max() < error * s.max()


def test_a_step_has_the_size_that_is_promised():
    """The root mean square of a step is the learning rate times `RMS`, whatever the gradient."""
    for scale in (1e-3, 1e3):
        weight = nn.Parameter(torch.zeros(64, 64))
        weight.grad = matrices(64, 64) * scale
        Muon([weight], 0.01).step()
        assert weight.square().mean().sqrt().item() == pytest.approx(0.01 * RMS, rel=0.15)


def test_it_solves_a_least_squares_problem():
    """Loss falls by orders of magnitude with a falling rate."""
    target, inputs = matrices(16, 8), matrices(64, 8)
    layer = nn.Linear(8, 16, bias=False)
    optimiser = Muon(layer.parameters(), 0.2)
    loss = inputs.new_tensor(0.0)
    for step in range(200):
        for group in optimiser.param_groups:
            group["lr"] = 0.2 * (1 - step / 200)
        loss = (layer(inputs) - inputs @ target.T).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 1e-3


def test_convolutions_and_several_of_a_shape_are_stepped_alone():
    """A kernel is its outputs by everything else; equal shapes do not mix."""
    kernels = [nn.Parameter(torch.zeros(4, 3, 3, 3, 3)) for _ in range(2)]
    kernels[0].grad = matrices(4, 3, 3, 3, 3)
    kernels[1].grad = -kernels[0].grad
    Muon(kernels, 0.1).step()
    assert kernels[0].any() and torch.allclose(kernels[0], -kernels[1])
    alone = nn.Parameter(torch.zeros(4, 3, 3, 3, 3))
    alone.grad = kernels[0].grad
    Muon([alone], 0.1).step()
    assert torch.allclose(alone, kernels[0], atol=1e-6)


def test_weight_decay_shrinks_and_a_missing_gradient_leaves_alone():
    """Decay is decoupled from the gradient; parameters without one stay."""
    still, moved = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    moved.grad = torch.zeros(4, 4)
    Muon([still, moved], 0.1, weight_decay=0.5).step()
    assert torch.equal(still, torch.ones(4, 4))
    assert torch.allclose(moved, torch.full((4, 4), 0.95))


def test_vectors_are_refused():
    """A bias is no matrix."""
    with pytest.raises(ValueError, match="matrices"):
        Muon([nn.Parameter(torch.zeros(3))])
