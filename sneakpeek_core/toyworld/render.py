"""Scenes to pictures: flat colours with smooth edges, 64x64, frames FHWC in [0, 1].

Legend: F frames, H height, W width, C colours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .motion import Moment, moments
from .scene import BOX_SIDE, SIZE, Point, Scene

TABLE = (0.87, 0.80, 0.68)
BOX_WALL = (0.45, 0.29, 0.16)
BOX_FLOOR = (0.60, 0.43, 0.27)
GLOVE = (0.10, 0.10, 0.12)
PAINT = {
    "red": (0.86, 0.12, 0.14),
    "blue": (0.12, 0.26, 0.88),
    "green": (0.10, 0.60, 0.16),
    "yellow": (0.98, 0.90, 0.10),
    "purple": (0.56, 0.14, 0.68),
    "cyan": (0.10, 0.80, 0.88),
}
WALL = 2.0  # pixels
BALL_RADIUS, SQUARE_HALF, TRIANGLE_HALF = 6.0, 5.5, 7.0
TRIANGLE_HEIGHT = 12.0


def render(scene: Scene) -> Tensor:
    """Return all frames of a scene, FHWC float32 in [0, 1]."""
    return render_moments(scene, moments(scene))


def render_moments(scene: Scene, frames: Sequence[Moment]) -> Tensor:
    """Return the frames of these moments of a scene, FHWC float32 in [0, 1]."""
    x, y = _grid()
    picture = torch.tensor(TABLE).expand(len(frames), SIZE, SIZE, 3).clone()
    half = BOX_SIDE / 2
    _paint(picture, _square(x - scene.box[0], y - scene.box[1], half), BOX_WALL)
    _paint(picture, _square(x - scene.box[0], y - scene.box[1], half - WALL), BOX_FLOOR)
    carried = torch.tensor([-1 if m.carried is None else m.carried for m in frames])
    hand = (_points([m.hand for m in frames], x), _points([m.hand for m in frames], y, axis=1))
    layers = [
        coverage(thing.shape, *_offsets(frames, i, x, y)) for i, thing in enumerate(scene.things)
    ]
    for i, thing in enumerate(scene.things):
        _paint(picture, layers[i] * (carried != i)[:, None, None], PAINT[thing.colour])
    closed = torch.tensor([m.closed for m in frames])[:, None, None]
    _paint(picture, _glove(x - hand[0], y - hand[1], closed), GLOVE)
    # what is carried lies in the hand, above everything
    for i, thing in enumerate(scene.things):
        _paint(picture, layers[i] * (carried == i)[:, None, None], PAINT[thing.colour])
    return picture


def coverage(shape: str, dx: Tensor, dy: Tensor) -> Tensor:
    """Return how much of a pixel an object covers, in [0, 1], from the offsets to its centre."""
    if shape == "ball":
        return _filled(torch.hypot(dx, dy) - BALL_RADIUS)
    if shape == "square":
        return _square(dx, dy, SQUARE_HALF)
    # an upright triangle: two slopes and a base, its centre at half its height
    slope = TRIANGLE_HEIGHT / TRIANGLE_HALF
    sides = (slope * dx.abs() - (dy + TRIANGLE_HEIGHT / 2)) / (1 + slope**2) ** 0.5
    return _filled(torch.maximum(sides, dy - TRIANGLE_HEIGHT / 2))


def _glove(dx: Tensor, dy: Tensor, closed: Tensor) -> Tensor:
    """The palm below the grip, and two fingers beside it that close."""
    palm = torch.hypot(dx / 1.3, dy - 9.5) - 5.0
    reach = torch.where(closed, 7.0, 9.5)
    fingers = _capsule(dx.abs(), dy, (4.0, 9.0), (reach, torch.full_like(reach, 0.0)), 1.7)
    return _filled(torch.minimum(palm, fingers))


def _capsule(dx: Tensor, dy: Tensor, a: Point, b: tuple[Tensor, Tensor], radius: float) -> Tensor:
    along_x, along_y = b[0] - a[0], b[1] - a[1]
    t = ((dx - a[0]) * along_x + (dy - a[1]) * along_y) / (along_x**2 + along_y**2)
    t = t.clamp(0, 1)
    return torch.hypot(dx - a[0] - t * along_x, dy - a[1] - t * along_y) - radius


def _square(dx: Tensor, dy: Tensor, half: float) -> Tensor:
    return _filled(torch.maximum(dx.abs(), dy.abs()) - half)


def _filled(distance: Tensor) -> Tensor:
    """Return coverage from the signed distance to an edge: a ramp of one pixel."""
    return (0.5 - distance).clamp(0, 1)


def _paint(picture_FHWC: Tensor, cover: Tensor, colour: tuple[float, float, float]) -> None:
    picture_FHWC.lerp_(
        torch.tensor(colour).expand_as(picture_FHWC), cover[..., None].expand_as(picture_FHWC)
    )


def _grid() -> tuple[Tensor, Tensor]:
    centres = torch.arange(SIZE) + 0.5
    return centres.expand(SIZE, SIZE), centres[:, None].expand(SIZE, SIZE)


def _points(points: Sequence[Point], like: Tensor, axis: int = 0) -> Tensor:
    return torch.tensor([p[axis] for p in points], dtype=like.dtype)[:, None, None]


def _offsets(frames: Sequence[Moment], i: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    at = [m.at[i] for m in frames]
    return x - _points(at, x), y - _points(at, y, axis=1)
