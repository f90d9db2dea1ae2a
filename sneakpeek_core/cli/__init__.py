"""The command line: `sneakpeek generate | inspect | estimate`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from .options import parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code (0 done, 1 stopped on the way, 2 bad input)."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except ValueError as error:
        print(f"sneakpeek: {error}", file=sys.stderr)
        return 2
