"""What is on a picture, from its pixels alone: objects by colour and shape, and the hand.

Every pixel goes to its nearest colour; a solid core of a paint with what is around it is an object
(two that touch at a corner have two cores); its shape is the one whose template fits its coverage
best. Positions are pixels, x to the right and y down, as in `scene`.

Legend: F frames, H height, W width, N objects found, P palette colours, T templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .render import BOX_FLOOR, BOX_WALL, GLOVE, PAINT, TABLE, coverage
from .scene import COLOURS, SHAPES, SIZE, Point

GROUNDS = (TABLE, BOX_FLOOR, BOX_WALL, GLOVE)  # what can lie under or beside an object
LEAST_AREA = 20  # pixels nearest to a paint; objects have 80 to 120
REACH = 10  # pixels from an object's centre to the edge of its window
GRID = 0.5  # pixels between the places at which a template is tried
GROWTH = 4  # pixels from an object's core to its farthest tip
LEAST_HAND = 8  # dark pixels
FOREIGN = 0.25  # of a colour channel that a pixel is off
LEAST_FOREIGN = 8  # such pixels whose neighbours are all foreign too


@dataclass(frozen=True)
class Blob:
    """An object that was found. `misfit` says for each shape how badly it fits, 0 is exactly."""

    colour: str
    at: Point
    area: float  # pixels covered
    misfit: tuple[float, ...]  # in the order of SHAPES

    @property
    def shape(self) -> str:
        """The shape that fits best."""
        return SHAPES[self.misfit.index(min(self.misfit))]


def find(frames_FHWC: Tensor, only: Sequence[str] | None = None) -> list[list[Blob]]:
    """Return the objects on each frame of pixels in [0, 1]; `only` names one colour per frame."""
    found: list[list[Blob]] = [[] for _ in frames_FHWC]
    paints = torch.arange(len(COLOURS)).view(1, -1, 1, 1)
    masks = _nearest(frames_FHWC).unsqueeze(1) == paints  # [F, colours, H, W]
    if only is not None:
        looked_for = torch.tensor([COLOURS.index(colour) for colour in only])
        masks = masks & (paints == looked_for.view(-1, 1, 1, 1))
    pairs = (masks.sum((2, 3)) >= LEAST_AREA).nonzero()
    if not len(pairs):
        return found
    chosen = masks[pairs[:, 0], pairs[:, 1]]
    labels = _grown(_components(_eroded(chosen)), chosen)
    owners, windows, corners = [], [], []
    for row, (frame, colour) in enumerate(pairs.tolist()):
        for label in labels[row].unique().tolist():
            own = labels[row] == label
            if label and int(own.sum()) >= LEAST_AREA:
                window_HW, corner = _window(frames_FHWC[frame], own, colour)
                owners.append((frame, colour))
                windows.append(window_HW)
                corners.append(corner)
    if not owners:
        return found
    covered_NHW = torch.stack(windows)
    for (frame, colour), area, (x, y), (misfit, at) in zip(
        owners, covered_NHW.sum((1, 2)).tolist(), corners, _fitted(covered_NHW), strict=True
    ):
        found[frame].append(Blob(COLOURS[colour], (x + at[0], y + at[1]), area, misfit))
    return found


def find_hand(frames_FHWC: Tensor) -> list[Point | None]:
    """Return the centre of the glove's pixels on each frame; None where there is none."""
    dark = (_nearest(frames_FHWC) == len(COLOURS) + GROUNDS.index(GLOVE)).float()
    count = dark.sum((1, 2))
    centres = torch.arange(SIZE) + 0.5
    x = (dark.sum(1) * centres).sum(1) / count
    y = (dark.sum(2) * centres).sum(1) / count
    return [
        (float(x[i]), float(y[i])) if count[i] >= LEAST_HAND else None for i in range(len(dark))
    ]


def foreign(frames_FHWC: Tensor, bare_FHWC: Tensor, known: Sequence[Sequence[Blob]]) -> list[bool]:
    """Say of each frame whether something lies there, or lacks, that is neither object nor hand.

    `bare_FHWC` shows what there is without objects; `known` are those that were found. A solid
    patch of another colour counts: an object nobody knows, half an object, no box. Dark pixels are
    the hand's, on either picture.
    """
    glove = len(COLOURS) + GROUNDS.index(GLOVE)
    off = (frames_FHWC - bare_FHWC).abs().amax(-1) > FOREIGN
    off &= (_nearest(frames_FHWC) != glove) & (_nearest(bare_FHWC) != glove)
    centres = torch.arange(SIZE) + 0.5
    for mask, blobs in zip(off, known, strict=True):
        for x, y in (blob.at for blob in blobs):
            mask &= torch.hypot(centres - x, centres[:, None] - y) > REACH
    return (_eroded(off).sum((1, 2)) >= LEAST_FOREIGN).tolist()


def _nearest(frames_FHWC: Tensor) -> Tensor:
    """Return the index of each pixel's nearest colour: the paints first, then the grounds."""
    palette = torch.tensor([*(PAINT[colour] for colour in COLOURS), *GROUNDS])
    # |p - c|^2 without p^2, which is the same for all colours
    scores = frames_FHWC @ palette.T * -2 + palette.square().sum(1)
    return scores.argmin(-1)


def _components(masks_NHW: Tensor) -> Tensor:
    """Return a label per connected region (8 neighbours), 0 outside."""
    numbers = torch.arange(1, masks_NHW[0].numel() + 1, dtype=torch.float32)
    inside = masks_NHW.float()
    labels = inside * numbers.view(masks_NHW[0].shape)
    for _ in range(SIZE):
        spread = inside * nnf.max_pool2d(labels, 3, stride=1, padding=1)
        if torch.equal(spread, labels):
            break
        labels = spread
    return labels.long()


def _grown(labels_NHW: Tensor, masks_NHW: Tensor) -> Tensor:
    """Return labels that spread inside the masks, up to GROWTH pixels."""
    labels = labels_NHW.float()
    for _ in range(GROWTH):
        spread = nnf.max_pool2d(labels, 3, stride=1, padding=1) * masks_NHW
        labels = torch.where(labels > 0, labels, spread)
    return labels.long()


def _eroded(masks_NHW: Tensor) -> Tensor:
    """Return the pixels whose 3x3 neighbourhood is all inside: edges of mixed colour have none."""
    outside = nnf.pad((~masks_NHW).float(), (1, 1, 1, 1), value=1.0)
    return nnf.max_pool2d(outside, 3, stride=1) == 0


def _window(frame_HWC: Tensor, own_HW: Tensor, colour: int) -> tuple[Tensor, Point]:
    """Return how much of each pixel around an object it covers, and the window's upper left corner.

    A pixel is a mix of the paint and whichever ground explains it best; pixels that are not next
    to the object belong to others.
    """
    rows, columns = own_HW.nonzero().float().mean(0).add(0.5).round().int().tolist()
    top, left = rows - REACH, columns - REACH
    around = nnf.max_pool2d(own_HW[None, None].float(), 5, stride=1, padding=2)[0, 0]
    pad = (REACH, REACH, REACH, REACH)
    near = nnf.pad(around, pad)[top + REACH :, left + REACH :][: 2 * REACH, : 2 * REACH]
    framed = nnf.pad(frame_HWC.movedim(-1, 0), pad).movedim(0, -1)
    pixels = framed[top + REACH :, left + REACH :][: 2 * REACH, : 2 * REACH]
    paint, grounds = torch.tensor(PAINT[COLOURS[colour]]), torch.tensor(GROUNDS)
    towards = paint - grounds  # [grounds, 3]
    offsets = pixels.unsqueeze(-2) - grounds  # [H, W, grounds, 3]
    share = (offsets * towards).sum(-1) / towards.square().sum(-1)
    share = share.clamp(0, 1)
    left_over = (offsets - share.unsqueeze(-1) * towards).square().sum(-1)
    best = left_over.argmin(-1, keepdim=True)
    return share.gather(-1, best).squeeze(-1) * near, (float(left), float(top))


@cache
def _templates() -> tuple[Tensor, Tensor]:
    """Return the coverage of every shape at every place in a window [T, H*W], and the places."""
    steps = torch.arange(-4.0, 4.0 + GRID, GRID) + REACH
    centres = torch.arange(2 * REACH) + 0.5
    drawn, places = [], []
    for shape in SHAPES:
        for y in steps.tolist():
            for x in steps.tolist():
                dx, dy = torch.meshgrid(centres - x, centres - y, indexing="xy")
                drawn.append(coverage(shape, dx, dy).flatten())
                places.append((x, y))
    return torch.stack(drawn), torch.tensor(places)


def _fitted(covered_NHW: Tensor) -> list[tuple[tuple[float, ...], Point]]:
    """Return for each window the misfit of each shape, and where the best one lies in it."""
    templates, places = _templates()
    covered = covered_NHW.flatten(1)
    errors = (
        covered.square().sum(1, keepdim=True)
        - 2 * covered @ templates.T
        + templates.square().sum(1)
    )
    by_shape = errors.view(len(covered), len(SHAPES), -1)
    misfits, best = by_shape.min(2)
    misfits = misfits / templates.square().sum(1).view(len(SHAPES), -1).mean(1)
    found = []
    for row, misfit in enumerate(misfits.clamp(min=0).tolist()):
        shape = misfit.index(min(misfit))
        place = places.view(len(SHAPES), -1, 2)[shape, int(best[row, shape])].tolist()
        found.append((tuple(misfit), (place[0], place[1])))
    return found
