"""`--watch`: changes of the steps file are proposed to the running stream as live edits."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path

from ..edits import Edit
from ..schedule import Schedule
from ..shapes import TEMPORAL
from ..stream import VideoStream
from .endings import on_one_line
from .steps import read_steps

INTERVAL = 0.25  # seconds between two looks at the file


class StepsWatcher:
    """A context manager: looks at the file from a thread of its own while the block runs.

    The file's steps come behind those of `before`, a continued cache's. Goals stay with the steps
    they were given to, by number.
    """

    def __init__(self, stream: VideoStream, path: Path | None, before: Schedule | None = None):
        self._stream = stream
        self._path = path
        self._before = before
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="steps-watcher", daemon=True)
        self._seen: tuple[int, int] | None = None  # so what changed while loading is noticed

    def __enter__(self) -> StepsWatcher:
        if self._path is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _stamp(self) -> tuple[int, int] | None:
        try:
            stat = self._path.stat() if self._path else None
        except OSError:  # an editor may replace the file for a moment
            return None
        return (stat.st_mtime_ns, stat.st_size) if stat else None

    def _look(self) -> None:
        waiting: list[Edit] = []
        while not self._stop.wait(INTERVAL):
            stamp = self._stamp()
            if stamp is not None and stamp != self._seen:
                self._seen = stamp
                waiting += self._propose()
            waiting = [edit for edit in waiting if not self._told(edit)]
        for edit in waiting:
            if not self._told(edit):
                print("\nedit not taken: no chunk was begun after it", file=sys.stderr)

    def _propose(self) -> list[Edit]:
        assert self._path is not None
        try:
            schedule = read_steps(self._path)
            if self._before is not None:
                schedule = self._before.extended(schedule)
            if schedule == self._stream.schedule:
                return []
            return [self._stream.edit(_with_goals_of(self._stream.schedule, schedule))]
        except ValueError as error:
            print(f"\nedit not taken: {on_one_line(str(error))}", file=sys.stderr)
            return []

    def _told(self, edit: Edit) -> bool:
        if not edit.wait(0):
            return False
        seconds = max(0, edit.latent_frame - 1) * TEMPORAL / self._stream.conditioner.fps
        words = f"in effect from {seconds:g} s" if edit.state == "landed" else edit.message
        print(f"\nedit {edit.state}: {words}", file=sys.stderr)
        return True


def _with_goals_of(old: Schedule, new: Schedule) -> Schedule:
    goals = [step.goal for step in old.steps] + [None] * len(new.steps)
    steps = (replace(s, goal=g) for s, g in zip(new.steps, goals, strict=False))
    return replace(new, steps=tuple(steps))
