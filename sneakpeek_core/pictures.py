"""Pictures from files, as the tensors the rest of the package works with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 2**26  # 64 million: a picture beyond is refused before it is decoded


def load_picture(path: str | Path, name: str = "image") -> Tensor:
    """Return a picture as [1, H, W, 3], float32 in [0, 1]; `ValueError` in words if it is none.

    Turned as its EXIF says; transparency is laid over white. `name` is the option to blame.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{name} {path} does not exist; check the path")
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(
                    f"{name} {path} has {picture.width}x{picture.height} pixels; "
                    f"scale it below {MAX_PIXELS // 10**6} million"
                )
            turned = ImageOps.exif_transpose(picture).convert("RGBA")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name} {path} is not a picture that can be read; use a PNG, JPEG or WebP"
        ) from error
    white = Image.new("RGBA", turned.size, "white")
    rgb = np.array(Image.alpha_composite(white, turned).convert("RGB"))
    return torch.from_numpy(rgb).float().div(255).unsqueeze(0)


def fitted(image_BHWC: Tensor, width: int, height: int) -> Tensor:
    """Scale a picture until it covers width x height and cut off what stands out, centred."""
    if image_BHWC.shape[1:3] == (height, width):
        return image_BHWC
    from kornia.geometry.transform import center_crop, resize  # slow to import, rarely needed

    rows, columns = image_BHWC.shape[1:3]
    scale = max(width / columns, height / rows)
    size = (max(height, round(rows * scale)), max(width, round(columns * scale)))
    scaled = resize(image_BHWC.movedim(-1, 1), size, "bicubic", antialias=scale < 1)
    return center_crop(scaled, (height, width)).movedim(1, -1).clamp(0, 1)
