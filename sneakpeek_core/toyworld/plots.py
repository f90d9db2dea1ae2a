"""An evaluation as a picture: step success and step-end PSNR over the steps of a video."""

from __future__ import annotations

from pathlib import Path

from .evaluation import Evaluation
from .results import Row, best, cell_of
from .score import mean_and_error

COLOURS = {"none": "#777777", "predicted": "#1f77b4", "oracle": "#2ca02c", "wrong": "#d62728"}


def plot_evaluation(result: Evaluation, picture: Path) -> None:
    """Draw a row of two panels for each number of steps and chunk length.

    Each mode is drawn at its best number of sampling steps; bars are standard errors over videos.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = sorted({cell[:2] for cell in result.rows})
    figure, axes = pyplot.subplots(
        len(groups), 2, figsize=(10, 3.2 * len(groups)), squeeze=False, sharex="row"
    )
    for (steps, chunk), (left, right) in zip(groups, axes, strict=True):
        for row in _best_rows(list(result.rows.values()), steps, chunk):
            scores = result.scores[cell_of(row)]
            for axis, name in ((left, "success"), (right, "psnr_db")):
                points = [
                    mean_and_error([float(getattr(video.steps[i], name)) for video in scores])
                    for i in range(steps)
                ]
                means, errors = zip(*points, strict=True)
                label = f"{row.guidance}, {row.sampling_steps} sampling steps"
                axis.errorbar(
                    range(1, steps + 1), means, errors, label=label,
                    color=COLOURS[row.guidance], capsize=2, linewidth=1.2,
                )  # fmt: skip
        left.set_ylabel("step success")
        right.set_ylabel("step-end PSNR, dB")
        for axis in (left, right):
            axis.set_title(f"{steps} steps, chunks of {chunk}", fontsize=10)
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(picture, dpi=100)
    pyplot.close(figure)


def _best_rows(rows: list[Row], steps: int, chunk: int) -> list[Row]:
    """Return the best row of each mode, in the order of the modes."""
    mine = [row for row in rows if (row.steps, row.chunk) == (steps, chunk)]
    modes = dict.fromkeys(row.guidance for row in mine)
    return [best(row for row in mine if row.guidance == mode) for mode in modes]
