"""How a command that cannot go on ends: its exit code, and the sentence that says why."""

from __future__ import annotations

import errno
import re

import torch

from ..stream import GenerationError

BAD_INPUT, STOPPED = 2, 1
INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended
# The CPU's allocator has no exception of its own.
_LACK = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


class Interrupted(Exception):
    """Ctrl-C, raised between two passes."""


def ending(error: BaseException) -> tuple[int, str]:
    """Return exit code and sentence for what ended a command early; raise what is a bug."""
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        return INTERRUPTED, "stopped"
    if isinstance(error, (GenerationError, ValueError, FloatingPointError)):
        return STOPPED, str(error)
    lacks_memory = isinstance(error, RuntimeError) and _LACK.search(str(error)) is not None
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or lacks_memory:
        return STOPPED, "out of memory; `sneakpeek estimate` says what to make smaller"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        fix = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        return STOPPED, f"{where}{error.strerror or error}; {fix} and go on"
    raise error


def on_one_line(text: str) -> str:
    """Return a message without line breaks and control characters: it may quote any file."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
