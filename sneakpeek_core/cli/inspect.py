"""`sneakpeek inspect FILE`."""

from __future__ import annotations

import argparse

from ..model.inspect import describe


def run(options: argparse.Namespace) -> int:
    """Print what a file is and how it would be run."""
    print(describe(options.file))
    return 0
