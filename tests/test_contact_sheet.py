"""Promises of the contact sheet: the right frames, few of them, and a picture for any text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from sneakpeek_core import contact_sheet as module
from sneakpeek_core.contact_sheet import (
    CELL,
    FONT_SIZE,
    GAP,
    TEXT_WIDTH,
    SheetRow,
    StepFrames,
    contact_sheet,
    save_contact_sheet,
)

RANGES = [("one", 0, 5), ("two", 5, 6), ("three", 6, 30)]


def numbered(first: int, end: int) -> torch.Tensor:
    """Frames FHWC uint8 whose value is their number."""
    return torch.arange(first, end, dtype=torch.uint8)[:, None, None, None].expand(-1, 4, 6, 3)


def numbers(frames: StepFrames) -> list[list[int]]:
    return [[int(np.asarray(frame)[0, 0, 0]) for frame in row.frames] for row in frames.rows()]


def row(width: int, height: int, count: int = 3, label: str = "step") -> SheetRow:
    return SheetRow(
        label=label, frames=[np.full((height, width, 3), 200, np.uint8) for _ in range(count)]
    )


@pytest.mark.parametrize("chunk", [1, 4, 7, 30])
def test_first_middle_last_whatever_the_chunks(chunk: int) -> None:
    """The picked frames depend on the ranges only; a step of one frame has one picture."""
    frames = StepFrames(RANGES)
    for first in range(0, 30, chunk):
        frames.add(first, numbered(first, min(30, first + chunk)))
    assert numbers(frames) == [[0, 2, 4], [5], [6, 17, 29]]
    assert [row.label for row in frames.rows()] == ["one", "two", "three"]


def test_float_frames_are_kept_as_uint8() -> None:
    """Frames in [0, 1] become levels."""
    frames = StepFrames([("one", 0, 1)])
    frames.add(0, numbered(9, 10).float() / 255)
    assert numbers(frames) == [[9]]


def test_only_begun_steps_have_rows_and_repeats_change_nothing() -> None:
    """A stream that stopped early shows what it has; a chunk made again is no second picture."""
    frames = StepFrames(RANGES)
    assert frames.rows() == []
    for _ in range(2):
        frames.add(0, numbered(0, 4))
    assert numbers(frames) == [[0, 2]]


def test_an_edit_moves_the_coming_steps() -> None:
    """After update the new ranges hold, for frames that passed as far as they were kept."""
    frames = StepFrames(RANGES)
    frames.add(0, numbered(0, 8))
    frames.update([("one", 0, 5), ("two", 5, 6), ("new", 6, 13), ("last", 13, 16)])
    frames.add(8, numbered(8, 16))
    assert numbers(frames) == [[0, 2, 4], [5], [6, 9, 12], [13, 14, 15]]
    with pytest.raises(ValueError, match=r"'b' has frames 3\.\.9; it must start at 4"):
        frames.update([("a", 0, 4), ("b", 3, 9)])
    assert [row.label for row in frames.rows()][-1] == "last"


def test_memory_is_three_frames_a_step() -> None:
    """A kept frame holds its own pixels only, not its chunk."""
    frames = StepFrames([("one", 0, 1000)])
    for first in range(0, 1000, 100):
        frames.add(first, torch.zeros(100, 8, 8, 3, dtype=torch.uint8))
    kept = [np.asarray(frame) for frame in frames.rows()[0].frames]
    assert len(kept) == 3
    assert all(frame.base is None and frame.nbytes == 192 for frame in kept)


def test_the_sheet_has_one_row_per_step_and_one_cell_per_frame() -> None:
    """Geometry: text column, cells of equal size, gaps; small frames keep hard pixels."""
    sheet = contact_sheet([row(64, 64), row(64, 64, count=1)])
    assert sheet.size == (TEXT_WIDTH + 2 * GAP + 3 * (CELL + GAP), GAP + 2 * (CELL + GAP))
    left = TEXT_WIDTH + 2 * GAP
    for column, line in ((0, 0), (1, 0), (2, 0), (0, 1)):
        x, y = left + column * (CELL + GAP), GAP + line * (CELL + GAP)
        assert sheet.getpixel((x, y)) == sheet.getpixel((x + CELL - 1, y + CELL - 1)) == (200,) * 3
        assert sheet.getpixel((x - 1, y)) == module.BACKGROUND
    assert sheet.getpixel((left + CELL + GAP, CELL + 2 * GAP)) == module.BACKGROUND
    checker = np.indices((64, 64)).sum(0)[..., None].repeat(3, -1) % 2 * 255
    cell = contact_sheet([SheetRow(label="", frames=[checker.astype(np.uint8)])])
    drawn = np.asarray(cell.crop((left, GAP, left + CELL, GAP + CELL)))
    assert np.array_equal(drawn, checker.repeat(3, 0).repeat(3, 1))


@pytest.mark.parametrize(("width", "height"), [(832, 480), (480, 832), (193, 16), (2000, 3)])
def test_big_frames_shrink_to_the_cell(width: int, height: int) -> None:
    """The longer side becomes CELL, the shape stays."""
    scale = CELL / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    sheet = contact_sheet([row(width, height, count=1)])
    assert sheet.size == (TEXT_WIDTH + 3 * GAP + size[0], 2 * GAP + size[1])


@pytest.mark.parametrize(
    "label",
    [
        "",
        " ",
        "日本語 🍳 عربى",
        "a\x00b\ud800c\ue000\u0301",
        "x" * 5000,
        "word " * 500,
        "\n\n\t",
        "W",
    ],
)
def test_any_text_can_be_drawn(label: str) -> None:
    """No text crashes, none runs into the pictures or out of its row."""
    sheet = contact_sheet([row(64, 64, label=label), row(64, 64, label="")])
    left = TEXT_WIDTH + 2 * GAP
    gap = np.asarray(sheet.crop((left - GAP + 1, 0, left, sheet.height)))
    between = np.asarray(sheet.crop((0, GAP + CELL, left, 2 * GAP + CELL)))
    assert (gap == module.BACKGROUND).all() and (between == module.BACKGROUND).all()


def test_text_without_glyphs_falls_back() -> None:
    """Letters with marks lose the marks, other unknown characters become a question mark."""
    font = ImageFont.load_default(size=FONT_SIZE)
    assert (
        module._drawable("crème\n brûlée, cafe\u0301 日\U0001f373", font) == "creme brulee, cafe ??"
    )
    lines = module._wrapped("whisk the eggs and the sugar " * 9, font, 3)
    assert len(lines) == 3 and lines[-1].endswith("...")
    assert all(font.getlength(line) <= TEXT_WIDTH for line in lines)
    text = "whisk the eggs and add the sugar, slowly"
    assert " ".join(module._wrapped(text, font, 9)) == text


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed save leaves the old sheet and no other file."""
    path = tmp_path / "sheet ü.png"
    save_contact_sheet(path, [row(64, 64)])
    before = path.read_bytes()
    with Image.open(path) as sheet:
        assert sheet.format == "PNG" and sheet.size == contact_sheet([row(64, 64)]).size

    def fail(self, target, **_):
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_contact_sheet(path, [row(16, 16)])
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_bad_input_is_refused(tmp_path: Path) -> None:
    """Each with what to do."""
    with pytest.raises(ValueError, match=r"use a\.png"):
        save_contact_sheet(tmp_path / "a.jpg", [row(8, 8)])
    with pytest.raises(ValueError, match="does not exist; create"):
        save_contact_sheet(tmp_path / "no" / "a.png", [row(8, 8)])
    with pytest.raises(ValueError, match="at least one frame"):
        contact_sheet([])
    with pytest.raises(ValueError, match=r"\(height, width, 3\)"):
        contact_sheet([SheetRow(label="", frames=[np.zeros((8, 8), np.uint8)])])
    assert not list(tmp_path.iterdir())
