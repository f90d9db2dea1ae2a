"""Pictures from files, as the tensors the rest of the package works with."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MAX_PIXELS = 2**26  # 64 million: a picture beyond is refused before it is decoded


def load_picture(path: str | Path, name: str = "image") -> Tensor:
    """Return a picture as [1, H, W, 3], float32 in [0, 1]; `ValueError` in words if it is none.

    Turned as its EXIF says; transparency is laid over white. `name` is the option to blame.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{name} {path} {what}; check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                turned = ImageOps.exif_transpose(picture).convert("RGBA")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(
            f"{name} {path} has too many pixels; scale it below {MAX_PIXELS // 10**6} million"
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise ValueError(
            f"{name} {path} is not a picture that can be read; use a PNG, JPEG or WebP"
        ) from error
    white = Image.new("RGBA", turned.size, "white")
    rgb = np.array(Image.alpha_composite(white, turned).convert("RGB"))
    return torch.from_numpy(rgb).float().div(255).unsqueeze(0)


def fitted(image_BHWC: Tensor, width: int, height: int) -> Tensor:
    """Cut a picture to the proportions of width x height, centred, and scale it to that size."""
    if image_BHWC.shape[1:3] == (height, width):
        return image_BHWC
    from kornia.geometry.transform import resize  # slow to import, rarely needed

    rows, columns = image_BHWC.shape[1:3]
    scale = max(width / columns, height / rows)
    # Cut first: a long thin picture would be scaled to any size.
    kept_rows = min(rows, max(1, round(height / scale)))
    kept_columns = min(columns, max(1, round(width / scale)))
    top, left = (rows - kept_rows) // 2, (columns - kept_columns) // 2
    kept_BHWC = image_BHWC[:, top : top + kept_rows, left : left + kept_columns]
    scaled = resize(kept_BHWC.movedim(-1, 1), (height, width), "bicubic", antialias=scale < 1)
    return scaled.movedim(1, -1).clamp(0, 1)
