"""Clips to train a VAE on: rendered once, kept as bytes, cut at random where something happens.

Which cuts a batch holds is a function of (seed, step, process), so that a resumed run sees what
an uninterrupted one would have seen. Legend: B batch, F frames, H height, W width, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

ON_SOMETHING = 0.8  # share of cuts that are centred on something; the rest lie anywhere
APPARENT = 60  # sum of differences over the channels, of 255 each, that shows
VIVID = 0.4  # distance between a colour's largest and least channel: no grey, brown or beige


class Clips:
    """Videos of one length and size, and where in them something is to be seen."""

    def __init__(self, videos_NFHWC: Tensor):
        assert videos_NFHWC.dtype == torch.uint8, videos_NFHWC.dtype
        self.videos_NFHWC = videos_NFHWC
        self.length, self.height, self.width = videos_NFHWC.shape[1:4]

    def cut(
        self,
        rng: torch.Generator,
        batch: int,
        frames: int,
        side: int,
        on_motion: float = 0.0,
        *,
        vivid: bool = False,
    ) -> Tensor:
        """Return BFHWC in [0, 1]: squares of `side` pixels, mostly around what is not ground.

        In a share `on_motion` of these it must be changing as well, and with `vivid` have a colour.
        """

        def draw(high: int) -> int:
            return int(torch.randint(high, (), generator=rng))

        cuts = []
        for _ in range(batch):
            video = self.videos_NFHWC[draw(len(self.videos_NFHWC))]
            start = draw(self.length - frames + 1)
            clip = video[start : start + frames]
            interesting = torch.empty(0, 2, dtype=torch.long)
            if torch.rand((), generator=rng) < ON_SOMETHING:
                moving = on_motion > 0 and float(torch.rand((), generator=rng)) < on_motion
                at = draw(frames - moving) + moving
                if moving:
                    changes = _unlike(clip[at], clip[at - 1])
                    if vivid:
                        changes &= is_vivid(clip[at] / 255)
                    interesting = changes.nonzero()
                if not len(interesting):
                    interesting = _unlike(clip[at], _ground(clip[at])).nonzero()
            if len(interesting):
                centre_y, centre_x = interesting[draw(len(interesting))].tolist()
            else:
                centre_y, centre_x = draw(self.height), draw(self.width)
            top = min(max(centre_y - side // 2, 0), self.height - side)
            left = min(max(centre_x - side // 2, 0), self.width - side)
            cuts.append(clip[:, top : top + side, left : left + side])
        return torch.stack(cuts).float() / 255


def is_vivid(pictures: Tensor) -> Tensor:
    """Return which pixels [...] of pictures [..., 3] in [0, 1] are of a strong colour."""
    return pictures.amax(-1) - pictures.amin(-1) > VIVID


def _ground(frame_HWC: Tensor) -> Tensor:
    """Return the most common colour of a frame, per channel."""
    return frame_HWC.flatten(0, 1).median(0).values


def _unlike(frame_HWC: Tensor, other: Tensor) -> Tensor:
    """Return where a frame differs from another, or from a colour, HW."""
    return (frame_HWC.int() - other.int()).abs().sum(-1) > APPARENT
