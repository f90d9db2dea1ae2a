"""The steps and the start image that the command line's options describe.

With neither --steps nor --image nor a cache to go on from, they are the embedded example's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from ..assembly import with_goals
from ..pictures import load_picture
from ..schedule import Schedule, parse_steps
from .options import goals_of

MAX_BYTES = 50_000_000  # more than a thousand of the longest steps
EXAMPLE = Path(__file__).parent.parent / "embedded"


def schedule_of(options: argparse.Namespace) -> Schedule:
    """Return the steps file's schedule with the goals in it; without a file, the example's."""
    schedule = read_steps(options.steps or EXAMPLE / "steps.txt")
    return with_goals(schedule, goals_of(options.goal))


def start_of(options: argparse.Namespace) -> Tensor | None:
    """Return the start image [1, H, W, 3] in [0, 1], or None for a video without one."""
    if options.image is not None:
        return load_picture(options.image)
    if options.steps is None and options.continue_from is None:
        return load_picture(EXAMPLE / "start.png")
    return None


def read_steps(path: Path) -> Schedule:
    """Parse a steps file; the `ValueError` for what is wrong with it names file and line."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES // 10**6} MB; split it")
        return parse_steps(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"steps {path} is not text in UTF-8; save it as that") from error
    except OSError as error:
        raise ValueError(
            f"steps {path} cannot be read ({error.strerror}); check the path"
        ) from error
    except ValueError as error:
        raise ValueError(f"steps {path}: {error}") from error
