"""What future guidance is worth, as numbers: the same scenes and noise under different settings.

A grid of steps, chunk lengths, guidance modes and sampling steps; each cell is a row with means
and standard errors over videos (`results` says how rows compare).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..assembly import Parts
from ..guidance import FutureGuidance
from ..settings import SamplerSettings
from ..shapes import TEMPORAL
from ..sigmas import uniform_sigmas
from .results import MEASURES, MODES, Cell, Comparison, Measured, Row, Rows, compared
from .rollouts import encode_step_ends, roll_out, stream_of
from .scene import FIRST_TRAINING_SEED, FRAMES_PER_STEP, Scene, make_scene
from .score import VideoScore, mean_and_error, score

BATCH = 16  # videos at once
BLOCK = 100_000  # scenes that belong to one seed


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What to run. Scenes follow `seed`; `shift` warps the noise levels."""

    tier: str
    steps: tuple[int, ...]
    chunks: tuple[int, ...]
    modes: tuple[str, ...]
    sampling_steps: tuple[int, ...]
    videos: int
    seed: int
    shift: float
    objects: int = 3

    def __post_init__(self) -> None:
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"guidance {mode!r} is unknown; use {', '.join(MODES)}")
        if not 2 <= self.videos <= BLOCK:
            raise ValueError(
                f"videos {self.videos} are not allowed: one has no standard error, and a seed has "
                f"{BLOCK} scenes; use 64"
            )
        most = FIRST_TRAINING_SEED // BLOCK - 1
        if not 0 <= self.seed <= most:
            raise ValueError(
                f"seed {self.seed} is not allowed: training has its scenes; use 0 to {most}"
            )

    @property
    def first_scene(self) -> int:
        """Seed of the first scene."""
        return self.seed * BLOCK

    @property
    def cells(self) -> list[Cell]:
        """What is run, in this order."""
        return list(itertools.product(self.steps, self.chunks, self.modes, self.sampling_steps))

    @property
    def drawn_from(self) -> tuple[object, ...]:
        """What decides on the scenes: tier, videos, seed and objects."""
        return self.tier, self.videos, self.seed, self.objects

    def scenes(self, steps: int) -> list[Scene]:
        """Return the scenes of every cell with this many steps."""
        return [
            make_scene(self.first_scene + i, steps, tier=self.tier, objects=self.objects)
            for i in range(self.videos)
        ]


@dataclass(kw_only=True)
class Evaluation:
    """What has been measured so far.

    `measured` holds the measures video by video, in the order of the scenes; `scores` the same with
    every step. `plain` are unguided cells to compare with: this model's, unless others were given.
    """

    rows: dict[Cell, Row] = field(default_factory=dict)
    measured: dict[Cell, Measured] = field(default_factory=dict)
    scores: dict[Cell, list[VideoScore]] = field(default_factory=dict)
    plain: Rows | None = None

    @property
    def comparisons(self) -> list[Comparison]:
        """Every guided cell against unguided ones of as many steps and the same chunk length."""
        return compared(Rows(rows=self.rows, measured=self.measured), self.plain)

    def to_json(self) -> dict[str, Any]:
        """Return rows, comparisons, and the measures of each row's videos and of their steps."""
        return {
            "rows": [asdict(row) for row in self.rows.values()],
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "videos": [
                {"cell": list(cell)}
                | {name: [round(v, 5) for v in values] for name, values in measured.items()}
                | {"every_step": [[asdict(s) for s in one.steps] for one in self.scores[cell]]}
                for cell, measured in self.measured.items()
            ],
        }


def evaluate(
    parts: Parts,
    settings: SamplerSettings,
    grid: Grid,
    done: Callable[[Evaluation, Row], None] = lambda result, row: None,
    plain: Rows | None = None,
) -> Evaluation:
    """Run the whole grid; `done` gets the evaluation so far with every row that is finished.

    `ValueError` for settings that cannot be, before anything is run.
    """
    for cell in grid.cells:
        settings_of(settings, grid, cell)
    result = Evaluation(plain=plain)
    for cell in grid.cells:
        scores, passes, seconds = run_cell(parts, settings, grid, cell)
        result.scores[cell] = scores
        result.measured[cell] = {name: [getattr(one, name) for one in scores] for name in MEASURES}
        result.rows[cell] = _row(grid, cell, result.measured[cell], passes, seconds)
        done(result, result.rows[cell])
    return result


def run_cell(
    parts: Parts, settings: SamplerSettings, grid: Grid, cell: Cell
) -> tuple[list[VideoScore], int, float]:
    """Return the scores of a cell's videos, frame passes and seconds of one video."""
    scenes, mode = grid.scenes(cell[0]), cell[2]
    others = [*scenes[1:], scenes[0]]
    own = settings_of(settings, grid, cell)
    scores, seconds, passes = [], 0.0, 0
    for first in range(0, len(scenes), BATCH):
        batch = scenes[first : first + BATCH]
        goals = None
        if mode in ("oracle", "wrong"):
            shown = batch if mode == "oracle" else others[first : first + BATCH]
            goals = encode_step_ends(parts, shown)
        began = time.perf_counter()
        made = roll_out(parts, stream_of(parts, batch, own, goals))
        seconds += time.perf_counter() - began
        passes = made.frame_passes
        for scene, frames in zip(batch, made.frames_BFHWC, strict=True):
            scores.append(score(scene, frames.float() / 255))
    return scores, passes, seconds / len(scenes)


def settings_of(settings: SamplerSettings, grid: Grid, cell: Cell) -> SamplerSettings:
    """Return a model's settings as a cell of the grid has them."""
    steps, chunk, mode, sampling_steps = cell
    guidance = settings.guidance or FutureGuidance()
    if guidance.plan_passes is not None and guidance.plan_passes > sampling_steps:
        raise ValueError(
            f"plan passes {guidance.plan_passes} are more than {sampling_steps} sampling steps; "
            "use as many or fewer"
        )
    modes = {"none": None, "predicted": "planned", "oracle": "given", "wrong": "given"}
    name = modes[mode]
    own = replace(
        settings,
        chunk=chunk,
        sigmas=uniform_sigmas(sampling_steps, grid.shift),
        first_sigmas=None,
        guidance=None if name is None else replace(guidance, mode=name),
    )
    own.check_length(1 + steps * FRAMES_PER_STEP // TEMPORAL)
    return own


def _row(grid: Grid, cell: Cell, measured: Measured, passes: int, seconds: float) -> Row:
    steps, chunk, mode, sampling_steps = cell
    numbers: dict[str, float] = {}
    for name in MEASURES:
        mean, error = mean_and_error(measured[name])
        numbers[name], numbers[f"{name}_se"] = round(mean, 5), round(error, 5)
    return Row(
        tier=grid.tier, steps=steps, chunk=chunk, guidance=mode, sampling_steps=sampling_steps,
        videos=grid.videos, frame_passes=passes, seconds=round(seconds, 3), **numbers,
    )  # fmt: skip
