"""A transformer as a denoiser: noisy latents and their noise levels in, clean latents out.

The only place where sigma becomes a timestep and a velocity becomes clean latents. What a text
costs is paid once: its keys and values are kept for as long as a step needs them.
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


class Branch(NamedTuple):
    """One side of classifier-free guidance: a text per frame, and what self-attention sees."""

    texts: Sequence[Tensor]  # embeddings [B or 1, L, text_dim], one per latent frame of the call
    extend: Extend


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
        # id(embeds) -> (embeds, layers). The tensor is held, so its id cannot be reused.
        self._texts: dict[int, tuple[Tensor, list[tuple[Tensor, Tensor]]]] = {}

    @property
    def layers(self) -> int:
        return len(self.tree.blocks)

    @property
    def dim(self) -> int:
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
                self._runs(branch.texts, len(x_BCFHW)), branch.extend,
                dtype=self.dtype, host=self.host,
            )
            for branch in branches
        ]  # fmt: skip
        if len(flows) == 1:
            return flows[0]
        positive, negative = flows
        return negative + cfg * (positive - negative)

    def forget_texts(self, keep: Sequence[Tensor] = ()) -> None:
        """Drop the keys and values of all texts but those in `keep`."""
        wanted = {id(text) for text in keep}
        self._texts = {key: value for key, value in self._texts.items() if key in wanted}

    def _sigmas(self, sigmas: Sequence[float] | Tensor, x_BCFHW: Tensor) -> Tensor:
        if isinstance(sigmas, Tensor):
            return sigmas.to(x_BCFHW.device, torch.float32)
        # Filled in place: copying a host list would wait for the device in every pass.
        filled = torch.empty(x_BCFHW.shape[0], len(sigmas), device=x_BCFHW.device)
        for frame, sigma in enumerate(sigmas):
            filled[:, frame] = sigma
        return filled

    def _runs(self, texts: Sequence[Tensor], batch: int) -> list[TextRun]:
        runs: list[TextRun] = []
        for frame, text in enumerate(texts):
            if frame and text is texts[frame - 1]:
                runs[-1] = runs[-1]._replace(stop=frame + 1)
            else:
                layers = [
                    (k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1))
                    for k, v in self._layers(text)
                ]
                runs.append(TextRun(frame, frame + 1, layers))
        return runs

    def _layers(self, text: Tensor) -> list[tuple[Tensor, Tensor]]:
        if torch.is_grad_enabled():  # a graph belongs to one backward pass
            return text_layers(self.tree, self._padded(text))
        known = self._texts.get(id(text))
        if known is None:
            known = self._texts[id(text)] = (text, text_layers(self.tree, self._padded(text)))
        return known[1]

    def _padded(self, text_BLC: Tensor) -> Tensor:
        length = text_BLC.shape[1]
        if length > self.text_len:
            log.warning("a text of %d tokens is cut to %d", length, self.text_len)
        text = text_BLC[:, : self.text_len]
        text = nnf.pad(text, (0, 0, 0, self.text_len - text.shape[1]))
        # The first layer's own parameters say where the tree lives.
        return text.to(self.tree.patch_embedding.weight.device, self.dtype)
