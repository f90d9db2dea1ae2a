"""The masked parallel forward: many chunks and keyframes of a video in one call, for training.

Clean frames, noisy open chunks and future keyframes lie side by side in one sequence; a mask gives
each what it would see in the cached, sequential loop (absolute positions). Both therefore compute
the same, which is a tested law: what is trained is what runs.

Visibility (design, section 5):

    query \\ key   | clean past                  | open chunk | future keyframes
    clean past    | its own chunk and kept ones | no         | never
    open chunk    | kept ones                   | its own    | those of its plan
    future        | kept ones                   | if joint   | its own plan
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .rope import Rope, rotate

KINDS = ("clean", "open", "future")


class Frame(NamedTuple):
    """What one latent frame of the sequence is.

    `chunk` is the chunk that a clean or an open frame belongs to, or for which a keyframe was
    planned. `plan` names a set of keyframes that see each other; an open frame sees the one it
    names (-1: none). An open chunk and its joint keyframes share both. A clean frame of a negative
    chunk saw nothing but itself.
    """

    kind: Literal["clean", "open", "future"]
    frame: int
    chunk: int
    plan: int = -1


def frame_mask(
    frames: Sequence[Frame], kept: Mapping[int, frozenset[int]], *, joint: bool = False
) -> Tensor:
    """Return the boolean mask [F, F] over frames; True where the row's frame sees the column's.

    `kept[c]` are the past frames held when chunk c opens.
    """
    kinds = torch.tensor([KINDS.index(frame.kind) for frame in frames])
    clean, opened, future = (kinds == kind for kind in range(len(KINDS)))
    number, chunk, plan = torch.tensor([frame[1:] for frame in frames]).unbind(1)
    held = torch.zeros(int(chunk.max()) + 1, int(number.max()) + 1, dtype=torch.bool)
    for opening, past in kept.items():
        if opening < len(held):
            held[opening, [frame for frame in past if frame < held.shape[1]]] = True

    def both(queries: Tensor, keys: Tensor) -> Tensor:
        return queries[:, None] & keys[None, :]

    same_chunk, same_plan = chunk[:, None] == chunk, (plan[:, None] == plan) & (plan != -1)
    past = (chunk < chunk[:, None]) & held[chunk.clamp(min=0)][:, number]
    mask = clean & (past | (clean[:, None] & same_chunk))
    mask |= both(opened, opened) & same_chunk & (plan[:, None] == plan)
    mask |= both(~clean, future) & same_plan
    if joint:
        mask |= both(future, opened) & same_chunk & same_plan
    return mask


class MaskedExtend:
    """An `Extend` for `velocity`: self-attention among the call's own frames, under a mask.

    `mask` is over frames, [F, F], or [B, F, F] where rows differ; it is spread over tokens once,
    on the device of the first keys.
    """

    def __init__(self, mask: Tensor, tokens_per_frame: int):
        self._over_frames = mask if mask.dim() == 3 else mask[None]
        self._tokens = tokens_per_frame
        self._mask: Tensor | None = None

    def __call__(
        self, layer: int, k_BTND: Tensor, v_BTND: Tensor, rope: Rope
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self._mask is None:
            hidden = ~self._over_frames.to(k_BTND.device)
            # Added to the logits: a boolean mask would be turned into this, and kept, per layer.
            bias = k_BTND.new_zeros(hidden.shape).masked_fill_(hidden, -math.inf)
            spread = bias.repeat_interleave(self._tokens, 1).repeat_interleave(self._tokens, 2)
            self._mask = spread.unsqueeze(1)
        return rotate(k_BTND, rope), v_BTND, self._mask
