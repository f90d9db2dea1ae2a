"""A transformer as a denoiser: noisy latents and their noise levels in, clean latents out.

The only place where sigma becomes a timestep and a velocity becomes clean latents.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .model.forward import Extend, Host, TextRun, check_tree, text_layers, velocity, wide
from .model.rope import Rope
from .sigmas import TRAIN_STEPS

log = logging.getLogger(__name__)


# id of a text's embeddings -> (the embeddings, their keys and values in every layer). The tensor
# is held, so its id stays its own.
KnownTexts = dict[int, tuple[Tensor, list[tuple[Tensor, Tensor]]]]


class Branch(NamedTuple):
    """One side of classifier-free guidance: a text per frame, and what self-attention sees.

    `known` keeps what texts cost; its owner drops it when the weights may have changed.
    """

    texts: Sequence[Tensor]  # embeddings [B or 1, L, text_dim], one per latent frame of the call
    extend: Extend
    known: KnownTexts


class Denoiser:
    """`(latents, sigmas, rope, branches) -> denoised` over a Wan tree.

    `dtype` is what the tree computes in, `text_len` the length prompts are padded to (zeros, no
    mask). Raises `ValueError` for trees that cannot be streamed.
    """

    def __init__(
        self,
        tree: Any,
        *,
        dtype: torch.dtype = torch.float32,
        text_len: int = 512,
        host: Host | None = None,
    ):
        check_tree(tree)
        self.tree = tree
        self.dtype = dtype
        self.text_len = text_len
        self.host = host or Host()

    @property
    def layers(self) -> int:
        """Transformer layers, each with keys and values of its own."""
        return len(self.tree.blocks)

    @property
    def dim(self) -> int:
        """Channels of a token: heads x 128."""
        return self.tree.patch_embedding.weight.shape[0]

    def __call__(
        self,
        x_BCFHW: Tensor,
        sigmas: Sequence[float] | Tensor,
        rope: Rope,
        branches: Sequence[Branch],
        cfg: float = 1.0,
    ) -> Tensor:
        """Return clean latents [B, C, F, H, W], float32.

        `sigmas` in [0, 1], one per latent frame of the call; a tensor [B, F] where rows differ.
        x0 = x - sigma * v is taken in float64 (Self-Forcing's contract).
        """
        sigmas_BF = self._sigmas(sigmas, x_BCFHW)
        flow = self.flow(x_BCFHW, sigmas_BF, rope, branches, cfg)
        precise = wide(x_BCFHW.device)
        scale = sigmas_BF[:, None, :, None, None].to(precise)
        return (x_BCFHW.to(precise) - scale * flow.to(precise)).float()

    def flow(
        self,
        x_BCFHW: Tensor,
        sigmas_BF: Tensor,
        rope: Rope,
        branches: Sequence[Branch],
        cfg: float = 1.0,
    ) -> Tensor:
        """Return the velocity (noise - clean) [B, C, F, H, W].

        Two branches (positive, negative) are combined by `cfg`. Both always run, so that each
        one's cache is written.
        """
        flows = [
            velocity(
                self.tree, x_BCFHW, sigmas_BF * TRAIN_STEPS, rope,
                self._runs(branch, x_BCFHW), branch.extend,
                dtype=self.dtype, host=self.host,
            )
            for branch in branches
        ]  # fmt: skip
        if len(flows) == 1:
            return flows[0]
        positive, negative = flows
        return negative + cfg * (positive - negative)

    def _sigmas(self, sigmas: Sequence[float] | Tensor, x_BCFHW: Tensor) -> Tensor:
        if isinstance(sigmas, Tensor):
            return sigmas.to(x_BCFHW.device, torch.float32)
        # Filled in place: copying a host list would wait for the device in every pass.
        filled = torch.empty(x_BCFHW.shape[0], len(sigmas), device=x_BCFHW.device)
        for frame, sigma in enumerate(sigmas):
            filled[:, frame] = sigma
        return filled

    def _runs(self, branch: Branch, x_BCFHW: Tensor) -> list[TextRun]:
        runs: list[TextRun] = []
        for frame, text in enumerate(branch.texts):
            if frame and text is branch.texts[frame - 1]:
                runs[-1] = runs[-1]._replace(stop=frame + 1)
                continue
            known = branch.known.get(id(text))
            if known is None:
                known = (text, text_layers(self.tree, self._padded(text, x_BCFHW.device)))
                if not torch.is_grad_enabled():  # a graph belongs to one backward pass
                    branch.known[id(text)] = known
            rows = len(x_BCFHW)
            layers = [(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in known[1]]
            runs.append(TextRun(frame, frame + 1, layers))
        return runs

    def _padded(self, text_BLC: Tensor, device: torch.device) -> Tensor:
        length = text_BLC.shape[1]
        if length > self.text_len:
            log.warning("a text of %d tokens is cut to %d", length, self.text_len)
        text = text_BLC[:, : self.text_len].to(device, self.dtype)
        return nnf.pad(text, (0, 0, 0, self.text_len - text.shape[1]))
