"""A run's log as a picture: losses over steps, and what was measured on held-out data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

PANELS_A_ROW = 3
NOT_DRAWN = ("step", "seconds")


def read_log(path: Path) -> Iterator[dict[str, float]]:
    """Yield the lines of a log, if there is one; a line that a kill cut short is left out."""
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def plot_curves(log: Path, picture: Path) -> None:
    """Draw one panel per number of the log, held-out ones into the panel of the same name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = list(read_log(log))
    names = sorted({name for line in lines for name in line} - set(NOT_DRAWN))
    panels = sorted({name.removeprefix("held_out_") for name in names})
    if not panels:
        return
    rows = -(-len(panels) // PANELS_A_ROW)
    figure, axes = pyplot.subplots(
        rows, PANELS_A_ROW, figsize=(4.2 * PANELS_A_ROW, 2.9 * rows), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for panel, axis in zip(panels, axes.flat, strict=False):
        for name, style in ((panel, "-"), (f"held_out_{panel}", "o-")):
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axis.plot(*zip(*points, strict=True), style, markersize=3, linewidth=1, label=name)
                if min(value for _, value in points) > 0 and not panel.endswith("_db"):
                    axis.set_yscale("log")
        axis.set_title(panel, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(picture, dpi=90)
    pyplot.close(figure)
