"""The command line: `sneakpeek COMMAND`, a file for each."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from .endings import BAD_INPUT, ending, on_one_line
from .options import parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code.

    0 done, 1 stopped on the way, 2 bad input, 130 Ctrl-C; all but 0 with a sentence on stderr.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        options = parser().parse_args(arguments)
        return options.run(options)
    except ValueError as error:
        code, words = BAD_INPUT, str(error)
    except (Exception, KeyboardInterrupt) as error:
        code, words = ending(error)
    print(f"sneakpeek: {on_one_line(words)}", file=sys.stderr)
    return code
