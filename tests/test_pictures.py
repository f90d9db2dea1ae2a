"""Pictures are fitted to the size of the video from their middle."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image


def test_a_thin_picture_is_fitted_without_being_blown_up() -> None:
    """A picture of one pixel by a million becomes the size asked for, from its middle."""
    from sneakpeek_core.pictures import fitted

    thin = torch.zeros(1, 1, 1_000_000, 3)
    thin[:, :, 499_999:500_001] = 1
    made = fitted(thin, 32, 32)
    assert made.shape == (1, 32, 32, 3)
    assert made.mean() > 0.9


def test_pictures_keep_their_middle(tmp_path: Path) -> None:
    """Fitting cuts what stands out on both sides alike, and fills the whole size."""
    from sneakpeek_core.pictures import fitted, load_picture

    wide = Image.new("RGB", (96, 32), "black")
    wide.paste((255, 255, 255), (32, 0, 64, 32))
    wide.save(tmp_path / "wide.png")
    made = fitted(load_picture(tmp_path / "wide.png"), 16, 16)
    assert made.shape == (1, 16, 16, 3) and made.min() > 0.99
