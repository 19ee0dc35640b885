"""Scenes as pixels, and what each patch of the background looks like."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from corematching.benchmarks.mini.backgrounds import LOOKS, draw_background
from corematching.benchmarks.mini.scenes import (
    COLOURS,
    GRID,
    ODD_COLOURS,
    PATCH,
    SPLITS,
    Distractor,
    Scene,
    SceneObject,
)

DISTRACTOR = len(LOOKS)
"""Number that stands for a distractor among the looks of patches."""
_HELD_OUT_DIGITS = 5  # every fifth handwritten digit belongs to the test split
_NOISE = 5.0


def render(scene: Scene) -> Image.Image:
    """The scene as a 336 x 336 RGB image; equal scenes give equal pixels."""
    return Image.fromarray(render_array(scene))


def render_array(scene: Scene, grid: int = GRID) -> np.ndarray:
    """The scene drawn on `grid` x `grid` patches, an array of shape (14 * grid, 14 * grid, 3), dtype uint8."""
    noise = np.random.default_rng([scene.seed, SPLITS.index(scene.split), 1])
    canvas = ground_of(scene, grid)[0].copy()
    for item in scene.objects:
        _paint(canvas, item, scene.split)
    canvas += noise.standard_normal((*canvas.shape[:2], 1), dtype=np.float32) * _NOISE
    return canvas.clip(0, 255).astype(np.uint8)


def ground_of(scene: Scene, grid: int = GRID) -> tuple[np.ndarray, np.ndarray]:
    """What the objects stand on: background and distractors.

    Returns
    -------
    canvas : float32 array (14 * grid, 14 * grid, 3)
    looks : int array (grid, grid)
        For each patch the index in :data:`LOOKS`, or :data:`DISTRACTOR`.
    """
    return _ground(scene.seed, scene.split, scene.distractors, grid)


@lru_cache(maxsize=16)
def _ground(seed: int, split: str, distractors: tuple[Distractor, ...], grid: int) -> tuple[np.ndarray, np.ndarray]:
    canvas, looks = draw_background(np.random.default_rng([seed, SPLITS.index(split)]), grid)
    for item in distractors:
        rows, cols = (slice(at, at + item.side) for at in (item.row, item.col))
        looks[rows, cols] = DISTRACTOR
        area = canvas[_pixels(rows), _pixels(cols)]
        area += (np.array(ODD_COLOURS[item.colour], np.float32) - area) * _mask(item.kind, item.side * PATCH)[..., None]
    return canvas, looks


def _pixels(patches: slice) -> slice:
    return slice(patches.start * PATCH, patches.stop * PATCH)


def _paint(canvas: np.ndarray, item: SceneObject, split: str) -> None:
    """Blend one object into the canvas (height, width, 3)."""
    x0, y0, x1, y1 = item.box
    x0, x1 = (min(max(v + item.dx, 0), canvas.shape[1]) for v in (x0, x1))
    y0, y1 = (min(max(v + item.dy, 0), canvas.shape[0]) for v in (y0, y1))
    size = (item.height * PATCH, item.width * PATCH)
    outline, ink = _stencil(item, size, split)
    top, left = max(-(item.row * PATCH + item.dy), 0), max(-(item.col * PATCH + item.dx), 0)
    window = (slice(top, top + y1 - y0), slice(left, left + x1 - x0))
    colour = np.array(COLOURS[item.colour], dtype=np.float32)
    dark = colour @ (0.3, 0.59, 0.11) < 110
    mark = np.float32(255 if dark else 0)
    body = colour + (mark - colour) * ink[window][..., None]
    cover = outline[window][..., None]
    area = canvas[y0:y1, x0:x1]
    area += (body - area) * cover


def _stencil(item: SceneObject, size: tuple[int, int], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and ink of an object, both (height, width) in [0, 1]."""
    if item.category == "shape":
        return _mask(item.kind, size[0]), _texture_ink(item.texture, size[0])
    plate = np.zeros(size, dtype=np.float32)
    plate[1:-1, 1:-1] = 1
    if item.category == "digit":
        drawings = digit_drawings(split)[int(item.kind)]
        return plate, _digit_ink(split, int(item.kind), item.variant % len(drawings), size[0])
    return plate, _word_ink(item.kind, size)


@lru_cache(maxsize=64)
def _mask(kind: str, side: int) -> np.ndarray:
    """Antialiased coverage of a shape on a square of `side` px, by 4 x 4 supersampling."""
    steps = 4
    axis = (np.arange(side * steps) + 0.5) / steps
    x, y = np.meshgrid(axis, axis)
    middle, reach = side / 2, side / 2 - 1
    u, v = (x - middle) / reach, (y - middle) / reach
    radius = np.hypot(u, v)
    inside = {
        "circle": radius <= 1,
        "square": (np.abs(u) <= 0.9) & (np.abs(v) <= 0.9),
        "triangle": (v <= 0.95) & (np.abs(u) <= (v + 1) / 1.95),
        "cross": (np.maximum(np.abs(u), np.abs(v)) <= 1) & (np.minimum(np.abs(u), np.abs(v)) <= 0.34),
        "ring": (radius <= 1) & (radius >= 0.5),
        "bar": np.abs(v - u) <= 0.3,
        "diamond": np.abs(u) + np.abs(v) <= 1,
        "arch": (radius <= 1) & (radius >= 0.55) & (v <= 0.1),
        "ell": (np.maximum(np.abs(u), np.abs(v)) <= 0.95) & ((u <= -0.4) | (v >= 0.4)),
    }[kind]
    return inside.reshape(side, steps, side, steps).mean(axis=(1, 3), dtype=np.float32)


@lru_cache(maxsize=64)
def _texture_ink(texture: str, side: int) -> np.ndarray:
    """Ink of a surface pattern with a period of seven pixels."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    if texture == "striped":
        return ((y % 7) < 3).astype(np.float32) * 0.6
    if texture == "dotted":
        return (((x % 7) - 3) ** 2 + ((y % 7) - 3) ** 2 <= 3.0).astype(np.float32) * 0.85
    return np.zeros((side, side), dtype=np.float32)


@lru_cache(maxsize=2)
def digit_drawings(split: str) -> tuple[np.ndarray, ...]:
    """The split's handwritten digits (scikit-learn's ``load_digits``): for each class an array (n, 8, 8) in [0, 1]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    held_out = np.arange(len(bunch.target)) % _HELD_OUT_DIGITS == 0
    chosen = held_out if split == "test" else ~held_out
    return tuple((bunch.images[chosen & (bunch.target == k)] / 16).astype(np.float32) for k in range(10))


@lru_cache(maxsize=4096)
def _digit_ink(split: str, digit: int, index: int, side: int) -> np.ndarray:
    drawing = Image.fromarray((digit_drawings(split)[digit][index] * 255).astype(np.uint8))
    inner = side - 6
    ink = np.zeros((side, side), dtype=np.float32)
    ink[3:-3, 3:-3] = np.asarray(drawing.resize((inner, inner), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    return ink


@lru_cache(maxsize=64)
def _word_ink(word: str, size: tuple[int, int]) -> np.ndarray:
    """The word in Pillow's own font, as large as the sign allows."""
    height, width = size
    points = 26
    while True:
        font = ImageFont.load_default(points)
        left, top, right, bottom = font.getbbox(word)
        if right - left <= width - 4:
            break
        points -= 1
    sheet = Image.new("L", (width, height))
    place = ((width - (right - left)) / 2 - left, (height - (bottom - top)) / 2 - top)
    ImageDraw.Draw(sheet).text(place, word, fill=255, font=font)
    return np.asarray(sheet, dtype=np.float32) / 255
