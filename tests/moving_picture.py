"""A picture that moves, written to a video file and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from torch import Tensor

from sneakpeek_core.video import VideoWriter, to_uint8

WIDTH, HEIGHT = 96, 64


def moving(frames: int, width: int = WIDTH, height: int = HEIGHT) -> Tensor:
    """A smooth picture that moves, float FHWC in [0, 1]."""
    f, y, x = torch.meshgrid(
        torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij"
    )
    waves = (x / 17 + f / 3, y / 13 - f / 5, (x + y) / 23 + f / 4)
    return torch.stack([0.5 + 0.4 * wave.sin() for wave in waves], dim=-1)


def decoded(path: Path) -> tuple[np.ndarray, list[int], list[bool], set[str]]:
    """Return frames FHWC uint8, pts, key flags and picture types."""
    reformatter, frames, pts, keys, kinds = VideoReformatter(), [], [], [], set()
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            picture = reformatter.reformat(
                frame,
                format="rgb24",
                src_colorspace=Colorspace.ITU709,
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.MPEG,
                dst_color_range=ColorRange.JPEG,
            )
            frames.append(picture.to_ndarray())
            pts.append(frame.pts)
            keys.append(frame.key_frame)
            kinds.add(PictureType(frame.pict_type).name)
            assert (int(frame.colorspace), int(frame.color_range)) == (1, 1)
    return np.stack(frames), pts, keys, kinds


def psnr(a: np.ndarray, b: Tensor) -> float:
    error = a.astype(np.float64) - to_uint8(b).numpy()
    return float(10 * np.log10(255**2 / np.square(error).mean()))


def writer(path: Path, **options: Any) -> VideoWriter:
    settings: dict[str, Any] = {"width": WIDTH, "height": HEIGHT, "fps": 16}
    return VideoWriter(path, **(settings | options))


def write_chunks(path: Path, chunks: list[int], **options) -> Tensor:
    """Write chunks of the given lengths, leave the file fragmented, return its frames."""
    frames = moving(sum(chunks))
    stream = writer(path, **options)
    for chunk in frames.split(chunks):
        stream.write(chunk)
    stream.abort()
    return frames
