"""A folder of videos with timed steps, as clips to train on.

`steps.jsonl` has one line per video: `{"video": "a.mp4", "steps": [{"text": "whisk the eggs",
"start": 0.0, "end": 4.0}, ...]}`, in seconds, each step beginning where the one before ends. What
lies before the first step and behind the last is left out. Files are anyone's: nothing outside the
folder is opened, and every complaint names the line.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import av.error
import numpy as np
import torch
from torch import Tensor

from ..pictures import fitted
from ..schedule import Schedule, Step, Timeline
from ..shapes import check_size
from .latent_set import Clip

STEPS_FILE = "steps.jsonl"
GAP = 0.05  # seconds that two steps may be apart
MAX_FRAMES = 20_000  # of one clip
AT_A_TIME = 32  # pictures that are scaled together


@dataclass(frozen=True)
class TimedVideo:
    """One line of the file: a video, where its first step begins, and the steps."""

    path: Path
    begin: float
    schedule: Schedule

    @property
    def name(self) -> str:
        """A name for the clip that changes with the file, its steps and their times."""
        file = self.path.stat()
        steps = [(step.text, step.seconds) for step in self.schedule.steps]
        facts = repr((self.path.name, file.st_size, file.st_mtime_ns, self.begin, steps))
        return hashlib.sha256(facts.encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class FolderData:
    """A recipe's `[data]`: the folder, and the size and frame rate of what is trained."""

    kind: Literal["folder"]
    path: str
    width: int
    height: int
    fps: float = 16.0

    def __post_init__(self) -> None:
        check_size(self.width, self.height)
        if not 0 < self.fps <= 1000:
            raise ValueError(f"fps {self.fps} is not allowed; Wan's is 16")

    def read(self) -> list[TimedVideo]:
        """Return all lines of the steps file; `ValueError` names the one that is wrong."""
        return read_steps_file(Path(self.path))

    def clip(self, video: TimedVideo) -> Clip:
        """Decode a video at the recipe's size and frame rate."""
        timeline = Timeline.of(video.schedule, self.fps)
        times = video.begin + np.arange(timeline.frames) / self.fps
        if len(times) > MAX_FRAMES:
            raise ValueError(f"{video.path.name}: {len(times)} frames are more than {MAX_FRAMES}")
        frames = decode_at(video.path, times, self.width, self.height)
        starts = (1, *timeline.ends)
        counts = (end - start for start, end in zip(starts, timeline.ends, strict=False))
        texts = (video.schedule.prompt(i) for i in range(len(timeline.ends)))
        return Clip(frames, tuple(zip(texts, counts, strict=True)))


def read_steps_file(folder: Path) -> list[TimedVideo]:
    """Return what `steps.jsonl` in a folder describes."""
    path = folder / STEPS_FILE
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); it lists the videos") from error
    videos = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            videos.append(_timed_video(folder, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path.name} line {number}: {error}") from error
    if not videos:
        raise ValueError(f"{path} lists no videos")
    return videos


def decode_at(path: Path, times: np.ndarray, width: int, height: int) -> Tensor:
    """Return the pictures shown at rising `times` (seconds), FHWC uint8, cut and scaled to fit.

    `ValueError` if the file is no video, or ends before the last time by more than one picture.
    """
    made: list[Tensor] = []
    shown: list[np.ndarray] = []

    def scale() -> None:
        if shown:
            pictures = torch.from_numpy(np.stack(shown)).float() / 255
            made.append((fitted(pictures, width, height) * 255).round().to(torch.uint8))
            shown.clear()

    index, last, last_time, rate = 0, None, 0.0, 25.0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or rate)
            began = float((stream.start_time or 0) * (stream.time_base or 0))
            for frame in container.decode(stream):
                time = frame.time - began if frame.time is not None else 0.0
                # the picture before is shown until this one comes
                while index < len(times) and last is not None and times[index] < time - 1e-6:
                    shown.append(last)
                    index += 1
                    if len(shown) == AT_A_TIME:
                        scale()
                if index == len(times):
                    break
                # telephones store pictures lying down, and how far to turn them
                upright = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                last, last_time = upright, time
    except (av.error.FFmpegError, IndexError, OSError) as error:
        raise ValueError(f"{path.name} is not a video that can be read ({error})") from error
    while index < len(times) and last is not None and times[index] < last_time + 1.5 / rate:
        shown.append(last)
        index += 1
    scale()
    if index < len(times):
        raise ValueError(
            f"{path.name} ends at {last_time:.2f} s, before its last step does "
            f"({times[-1]:.2f} s); correct the steps"
        )
    return torch.cat(made)


def _timed_video(folder: Path, line: Any) -> TimedVideo:
    if not isinstance(line, dict) or not isinstance(line.get("video"), str):
        raise ValueError('it is not {"video": FILE, "steps": [...]}')
    path = (folder / line["video"]).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"video {line['video']!r} lies outside the folder; move it inside")
    if not path.is_file():
        raise ValueError(f"video {line['video']!r} does not exist")
    steps = line.get("steps")
    if not isinstance(steps, list) or not steps:
        raise ValueError("it has no steps")
    made: list[Step] = []
    first, at = 0.0, 0.0
    for step in steps:
        text, start, end = _step(step)
        if not made:
            first = at = start
        if abs(start - at) > GAP:
            raise ValueError(
                f"step {text!r} starts at {start:g} s, the one before ends at {at:g} s; steps "
                "must follow each other"
            )
        # from the last end, so that gaps within the tolerance do not add up
        made.append(Step(text=text, seconds=end - at))
        at = end
    return TimedVideo(path, first, Schedule(tuple(made)))


def _step(step: Any) -> tuple[str, float, float]:
    if not isinstance(step, dict) or not isinstance(step.get("text"), str) or not step["text"]:
        raise ValueError(f"step {step!r} has no text")
    start, end = (_seconds(step, name) for name in ("start", "end"))
    if end <= start:
        raise ValueError(f"step {step['text']!r} ends at {end:g} s, before it starts")
    return step["text"], start, end


def _seconds(step: dict[str, Any], name: str) -> float:
    value = step.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(
            f"step {step['text']!r}: {name} {step.get(name)!r} is not a time in seconds"
        )
    return float(value)
