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

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .rope import Rope, rotate


class Frame(NamedTuple):
    """What one latent frame of the sequence is.

    `chunk` is the chunk that a clean or an open frame belongs to, or for which a keyframe was
    planned. `plan` names a set of keyframes that see each other; an open frame sees the one it
    names (-1: none). An open chunk and its joint keyframes share both.
    """

    kind: Literal["clean", "open", "future"]
    frame: int
    chunk: int
    plan: int = -1


def visible(
    query: Frame, key: Frame, kept: Mapping[int, frozenset[int]], *, joint: bool = False
) -> bool:
    """Say whether `query` attends to `key`. `kept[c]` are the past frames held when c opens."""
    if key.kind == "clean":
        own = query.kind == "clean" and query.chunk == key.chunk
        return own or (key.chunk < query.chunk and key.frame in kept[query.chunk])
    if query.kind == "clean":
        return False
    same_plan = query.plan == key.plan != -1
    if key.kind == "open":
        own = query.chunk == key.chunk and query.plan == key.plan
        return own and (query.kind == "open" or (joint and same_plan))
    return same_plan


def frame_mask(
    frames: Sequence[Frame], kept: Mapping[int, frozenset[int]], *, joint: bool = False
) -> Tensor:
    """Return the boolean mask [F, F] over frames; True where the row's frame sees the column's."""
    return torch.tensor([[visible(q, k, kept, joint=joint) for k in frames] for q in frames])


class MaskedExtend:
    """An `Extend` for `velocity`: self-attention among the call's own frames, under a mask.

    `mask_FF` is over frames; it is spread over tokens once, on the device of the first keys.
    """

    def __init__(self, mask_FF: Tensor, tokens_per_frame: int):
        self._mask_FF = mask_FF
        self._tokens = tokens_per_frame
        self._mask: Tensor | None = None

    def __call__(
        self, layer: int, k_BTND: Tensor, v_BTND: Tensor, rope: Rope
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self._mask is None:
            spread = self._mask_FF.to(k_BTND.device).repeat_interleave(self._tokens, 0)
            self._mask = spread.repeat_interleave(self._tokens, 1)[None, None]
        return rotate(k_BTND, rope), v_BTND, self._mask
