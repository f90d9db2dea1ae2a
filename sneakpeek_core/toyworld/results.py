"""Rows of an evaluation, and how they compare, video by video, with unguided ones.

Guided cells are compared with unguided cells of as many steps and the same chunk length: at the
same number of sampling steps, at each mode's best, and where the unguided one may spend as much
compute. The unguided cells may be another model's, from its own evaluation of the same scenes; then
this model's own are compared with them, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .score import paired

MODES = ("none", "predicted", "oracle", "wrong")
MEASURES: tuple[str, ...] = (
    "step_success", "all_steps_right", "persistence", "shape", "position_error_px", "hand_path",
    "psnr_db", "psnr_drift_db",
)  # fmt: skip
COMPARED = ("step_success", "persistence", "shape", "position_error_px", "psnr_db")

Cell = tuple[int, int, str, int]  # steps, chunk, guidance, sampling steps
Measured = Mapping[str, Sequence[float]]  # by measure, one number per video


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell: means over videos, and `_se` their standard errors."""

    tier: str
    steps: int
    chunk: int
    guidance: str
    sampling_steps: int
    videos: int
    step_success: float
    step_success_se: float
    all_steps_right: float
    all_steps_right_se: float
    persistence: float
    persistence_se: float
    shape: float
    shape_se: float
    position_error_px: float
    position_error_px_se: float
    hand_path: float
    hand_path_se: float
    psnr_db: float
    psnr_db_se: float
    psnr_drift_db: float
    psnr_drift_db_se: float
    frame_passes: int  # latent frames through the transformer, for one video
    seconds: float  # for one video, in a batch


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows by their cells, and the measures of each row's videos."""

    rows: Mapping[Cell, Row]
    measured: Mapping[Cell, Measured]

    def of(self, steps: int, chunk: int, mode: str) -> list[Row]:
        """Return the rows of a mode, one for each number of sampling steps."""
        return [row for cell, row in self.rows.items() if cell[:3] == (steps, chunk, mode)]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A cell against an unguided one, paired by video: mean difference and its error."""

    steps: int
    chunk: int
    guidance: str
    at: str  # "same sampling steps", "best of each", "as much compute for none"
    sampling_steps: int
    none_sampling_steps: int
    frame_passes: int
    none_frame_passes: int
    better: int  # videos with more steps right than the unguided one's
    worse: int
    differences: dict[str, tuple[float, float]]  # measure -> (mean, standard error)


def cell_of(row: Row) -> Cell:
    """Return where in the grid a row stands."""
    return row.steps, row.chunk, row.guidance, row.sampling_steps


def best(rows: Iterable[Row]) -> Row:
    """Return the row with most steps right; of equal ones the one nearest to the truth."""
    return max(rows, key=lambda row: (row.step_success, -row.position_error_px))


def compared(own: Rows, other: Rows | None = None) -> list[Comparison]:
    """Return comparisons of guided cells with unguided ones: one's own, or another model's."""
    plain = own if other is None else other
    found = []
    for (steps, chunk), mode in itertools.product(
        sorted({cell[:2] for cell in own.rows}), MODES if other is not None else MODES[1:]
    ):
        rows, unguided = own.of(steps, chunk, mode), plain.of(steps, chunk, "none")
        if rows and unguided:
            found += [
                _comparison(
                    at, one, own.measured[cell_of(one)], none, plain.measured[cell_of(none)]
                )
                for at, one, none in _pairs(rows, unguided)
            ]
    return found


def unguided_of(found: Any, scenes: tuple[object, ...]) -> Rows:
    """Return the unguided cells of an evaluation's JSON.

    `scenes` are the tier, videos, seed and objects that it must be of; `ValueError` if it is not.
    """
    try:
        options = found["options"]
        theirs = tuple(options[key] for key in ("tier", "videos", "seed", "objects"))
        if theirs != scenes:
            raise ValueError(
                f"its tier, videos, seed and objects are {theirs}, not {scenes}; use the same"
            )
        rows = [Row(**row) for row in found["rows"] if row["guidance"] == "none"]
        measured = {tuple(one["cell"]): one for one in found["videos"]}
        cells = {cell_of(row): row for row in rows}
        return Rows(
            rows=cells,
            measured={cell: {name: measured[cell][name] for name in MEASURES} for cell in cells},
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is no evaluation ({error!r} is missing or wrong)") from error


def _pairs(rows: list[Row], unguided: list[Row]) -> Iterator[tuple[str, Row, Row]]:
    for one, none in itertools.product(rows, unguided):
        if one.sampling_steps == none.sampling_steps:
            yield "same sampling steps", one, none
    most = best(rows)
    yield "best of each", most, best(unguided)
    # The dearest that none may be: what guidance spends, rounded up to a cell there is.
    dearer = [row.frame_passes for row in unguided if row.frame_passes >= most.frame_passes]
    if most.guidance != "none" and dearer:
        affordable = [row for row in unguided if row.frame_passes <= min(dearer)]
        yield "as much compute for none", most, best(affordable)


def _comparison(
    at: str, one: Row, measured: Measured, none: Row, none_measured: Measured
) -> Comparison:
    steps_right = zip(measured["step_success"], none_measured["step_success"], strict=True)
    signs = [(a > b) - (a < b) for a, b in steps_right]
    return Comparison(
        steps=one.steps,
        chunk=one.chunk,
        guidance=one.guidance,
        at=at,
        sampling_steps=one.sampling_steps,
        none_sampling_steps=none.sampling_steps,
        frame_passes=one.frame_passes,
        none_frame_passes=none.frame_passes,
        better=signs.count(1),
        worse=signs.count(-1),
        differences={name: paired(measured[name], none_measured[name]) for name in COMPARED},
    )
