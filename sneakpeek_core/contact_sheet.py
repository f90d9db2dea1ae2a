"""A picture of a whole video: one row per step with its first, middle and last frame.

`StepFrames` picks those frames while the video streams by, `contact_sheet` draws them. Frames are
HWC (height, width, RGB); a range is (label, first, end) in frame numbers, `end` not in it.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .video import to_uint8
from .whole_file import whole_file

Range = tuple[str, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

CELL = 192  # pixels of the longer side of a drawn frame
TEXT_WIDTH = 232  # pixels
GAP = 8  # pixels around everything
FONT_SIZE = 16  # pixels
LINE = 20  # pixels from one line of text to the next
BACKGROUND, INK = (24, 24, 27), (235, 235, 235)
MISSING = "?"  # drawn for what the font has no glyph of


@dataclass(frozen=True, kw_only=True)
class SheetRow:
    """One step: its text and its frames, HxWx3 uint8 (or float tensors in [0, 1])."""

    label: str
    frames: Sequence[np.ndarray | Tensor]


class StepFrames:
    """Keep the first, middle and last frame of every step while frames stream by.

    Holds at most three frames per step whatever the length of the video. Frames that were there
    before an `update` are kept where the new ranges still want them.
    """

    def __init__(self, ranges: Sequence[Range]) -> None:
        """`ranges` lie one after another without overlap; `ValueError` if they do not."""
        self._frames: dict[int, np.ndarray] = {}
        self._ranges = _checked_ranges(ranges)

    def add(self, first_frame_index: int, frames_FHWC: Tensor) -> None:
        """Look at a chunk that starts at `first_frame_index`; uint8 or float in [0, 1]."""
        end = first_frame_index + len(frames_FHWC)
        for number in self._wanted():
            if first_frame_index <= number < end:
                frame = to_uint8(frames_FHWC[number - first_frame_index].detach()).cpu().numpy()
                self._frames[number] = frame.copy()  # a view would keep the whole chunk alive

    def update(self, ranges: Sequence[Range]) -> None:
        """Replace the ranges, after an edit of coming steps; `ValueError` changes nothing."""
        self._ranges = _checked_ranges(ranges)
        wanted = self._wanted()
        self._frames = {n: frame for n, frame in self._frames.items() if n in wanted}

    def rows(self) -> list[SheetRow]:
        """Return one row per step that has begun, with the frames seen so far."""
        rows = []
        for label, first, end in self._ranges:
            frames = [self._frames[n] for n in _picks(first, end) if n in self._frames]
            if frames:
                rows.append(SheetRow(label=label, frames=frames))
        return rows

    def _wanted(self) -> set[int]:
        return {n for _, first, end in self._ranges for n in _picks(first, end)}


def contact_sheet(steps: Sequence[SheetRow]) -> Image.Image:
    """Draw one row per step, its label on the left; `ValueError` without a frame."""
    pictures = [[_fitted(frame) for frame in row.frames] for row in steps]
    if not any(pictures):
        raise ValueError("a contact sheet needs at least one frame; no step has any yet")
    columns = max(len(row) for row in pictures)
    cell_width = max(picture.width for row in pictures for picture in row)
    cell_height = max(picture.height for row in pictures for picture in row)
    left, pitch = TEXT_WIDTH + 2 * GAP, cell_height + GAP
    size = (left + columns * (cell_width + GAP), GAP + len(steps) * pitch)
    sheet = Image.new("RGB", size, BACKGROUND)
    for index, (row, row_pictures) in enumerate(zip(steps, pictures, strict=True)):
        top = GAP + index * pitch
        _draw_label(ImageDraw.Draw(sheet), (GAP, top), row.label, cell_height)
        for column, picture in enumerate(row_pictures):
            sheet.paste(picture, (left + column * (cell_width + GAP), top))
    return sheet


def save_contact_sheet(path: str | os.PathLike[str], rows: Sequence[SheetRow]) -> None:
    """Write the sheet as PNG; on any error an earlier file at `path` is untouched."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path} does not end in .png; use {path.with_suffix('.png').name}")
    if not path.parent.is_dir():
        raise ValueError(f"folder {path.parent} does not exist; create it first")
    sheet = contact_sheet(rows)
    with whole_file(path) as part:
        sheet.save(part, format="PNG")


def _checked_ranges(ranges: Sequence[Range]) -> tuple[Range, ...]:
    at = 0
    for label, first, end in ranges:
        if first < at or end <= first:
            raise ValueError(
                f"step {label!r} has frames {first}..{end}; "
                f"it must start at {at} or later and end after it starts"
            )
        at = end
    return tuple(ranges)


def _picks(first: int, end: int) -> tuple[int, ...]:
    """Return the numbers of the first, middle and last frame, each once."""
    return tuple(dict.fromkeys((first, (first + end - 1) // 2, end - 1)))


def _fitted(frame_HWC: np.ndarray | Tensor) -> Image.Image:
    """Scale a frame to the cell: up by a whole factor with hard pixels, down smoothly."""
    tensor = frame_HWC if isinstance(frame_HWC, Tensor) else torch.from_numpy(frame_HWC.copy())
    if tensor.ndim != 3 or tensor.shape[2] != 3 or not tensor.numel():
        raise ValueError(f"a frame has shape {tuple(tensor.shape)}; it must be (height, width, 3)")
    picture = Image.fromarray(to_uint8(tensor.detach()).cpu().contiguous().numpy())
    longest = max(picture.size)
    if longest <= CELL:
        factor = CELL // longest
        size = (picture.width * factor, picture.height * factor)
        return picture.resize(size, Image.Resampling.NEAREST)
    size = (
        max(1, round(picture.width * CELL / longest)),
        max(1, round(picture.height * CELL / longest)),
    )
    return picture.resize(size, Image.Resampling.LANCZOS)


def _draw_label(draw: ImageDraw.ImageDraw, at: tuple[int, int], label: str, height: int) -> None:
    font = ImageFont.load_default(size=FONT_SIZE)
    x, y = at
    for line in _wrapped(_drawable(label, font), font, max(1, height // LINE)):
        draw.text((x, y), line, font=font, fill=INK)
        y += LINE


def _drawable(text: str, font: Font) -> str:
    """Return `text` on one line without what the font lacks: é becomes e, 日 becomes `MISSING`.

    A font without a glyph draws a box; that of a private character shows what it looks like.
    Pillow's bitmap font (in a build without FreeType) raises instead.
    """
    box = _glyph("\ue000", font)
    drawn = []
    for character in " ".join(unicodedata.normalize("NFC", text).split()):
        if unicodedata.combining(character):
            continue
        plain = unicodedata.normalize("NFKD", character)[0]
        fits = (c for c in (character, plain) if c == " " or _glyph(c, font) not in (None, box))
        drawn.append(next(fits, MISSING))
    return "".join(drawn)


def _glyph(character: str, font: Font) -> bytes | None:
    picture = Image.new("L", (2 * FONT_SIZE, 2 * FONT_SIZE))
    try:
        ImageDraw.Draw(picture).text((0, 0), character, font=font, fill=255)
    except (UnicodeError, OSError):
        return None
    return picture.tobytes()


def _wrapped(text: str, font: Font, lines: int) -> list[str]:
    """Break `text` into at most `lines` lines of `TEXT_WIDTH`, an ellipsis where it goes on."""
    done: list[str] = []
    rest = text
    while rest and len(done) < lines:
        fits = _fitting(rest, font)
        if fits < len(rest) and len(done) == lines - 1:
            fits = min(fits, _fitting(rest[:fits] + "...", font) - 3, len(rest))
            done.append(rest[: max(0, fits)].rstrip() + "...")
            break
        space = rest.rfind(" ", 0, fits + 1)
        cut = fits if fits == len(rest) or space <= 0 else space
        done.append(rest[:cut])
        rest = rest[cut:].lstrip()
    return done


def _fitting(text: str, font: Font) -> int:
    """Return how many leading characters of `text` fit the column, at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if font.getlength(text[:middle]) <= TEXT_WIDTH:
            low = middle
        else:
            high = middle - 1
    return low
