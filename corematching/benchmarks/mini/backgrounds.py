"""What lies behind the objects: regions of plain colour, gradients, textures and crops of two photographs.

An image that is mostly one grey lets that grey outvote everything; here a background has one to four regions, each with
a look of its own. Colours are muted and kept off black and white, so that every object stands out.

The photographs are scikit-learn's sample images ``china.jpg`` and ``flower.jpg`` (Creative Commons Attribution 2.0,
by danielbuechele and vultilion on Flickr); scenes of both splits draw from the same two.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image

PATCH = 14
LOOKS = ("plain", "gradient", "noise", "stripes", "checks", "photo")
_LOW, _HIGH = 45.0, 210.0  # objects may be black or white, backgrounds not
_PHOTOS = ("china.jpg", "flower.jpg")


def draw_background(rng: np.random.Generator, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """A background of `grid` x `grid` patches.

    Returns
    -------
    canvas : float32 array (14 * grid, 14 * grid, 3)
    looks : int array (grid, grid)
        For each patch the index in :data:`LOOKS` of the region at its centre.
    """
    side = grid * PATCH
    looks = rng.integers(len(LOOKS), size=rng.integers(1, 5))
    region = _regions(rng, len(looks), side)
    canvas = np.empty((side, side, 3), dtype=np.float32)
    for number, look in enumerate(looks):
        inside = region == number
        canvas[inside] = _PAINT[LOOKS[look]](rng, side)[inside]
    centres = region[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
    return canvas.clip(_LOW, _HIGH), looks[centres]


def _regions(rng: np.random.Generator, count: int, side: int) -> np.ndarray:
    """The number of the nearest of `count` random points, for each pixel."""
    points = rng.uniform(0, side, (count, 2)).astype(np.float32)
    axis = np.arange(side, dtype=np.float32)
    distance = (axis[None, :, None] - points[:, 0, None, None]) ** 2 + (axis - points[:, 1, None, None]) ** 2
    return distance.argmin(0)


def _muted(rng: np.random.Generator) -> np.ndarray:
    """A colour near grey."""
    return (rng.uniform(80, 185) + rng.uniform(-28, 28, 3)).astype(np.float32)


def _wave(rng: np.random.Generator, side: int, shortest: float, longest: float) -> np.ndarray:
    """Phase in turns along a random direction, shape (side, side)."""
    angle, period = rng.uniform(0, math.pi), rng.uniform(shortest, longest)
    axis = np.arange(side, dtype=np.float32)
    return (axis[:, None] * math.sin(angle) + axis * math.cos(angle)) / period + rng.uniform()


def _plain(rng: np.random.Generator, side: int) -> np.ndarray:
    return np.broadcast_to(_muted(rng), (side, side, 3))


def _gradient(rng: np.random.Generator, side: int) -> np.ndarray:
    ramp = _wave(rng, side, side, 1.5 * side)
    ramp = (ramp - ramp.min()) / (ramp.max() - ramp.min())
    return _two_colours(rng, ramp * 2)


def _noise(rng: np.random.Generator, side: int) -> np.ndarray:
    cells = int(side / rng.uniform(4, 34))
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    cloud = np.asarray(coarse.resize((side, side), Image.Resampling.BILINEAR))
    return _muted(rng) + rng.uniform(15, 40) * cloud[..., None]


def _stripes(rng: np.random.Generator, side: int) -> np.ndarray:
    bars = np.where(_wave(rng, side, 12, 60) % 1 < rng.uniform(0.3, 0.7), 1.0, 0.0)
    return _two_colours(rng, bars)


def _checks(rng: np.random.Generator, side: int) -> np.ndarray:
    axis = np.arange(side) / rng.uniform(8, 40) + rng.uniform()
    return _two_colours(rng, ((axis[:, None].astype(int) + axis.astype(int)) % 2).astype(np.float32))


def _two_colours(rng: np.random.Generator, share: np.ndarray) -> np.ndarray:
    one = _muted(rng)
    return one + share[..., None] * (rng.choice((-1, 1)) * rng.uniform(20, 50) + rng.uniform(-15, 15, 3))


def _photo(rng: np.random.Generator, side: int) -> np.ndarray:
    """A square crop, a little paler than the photograph and with less contrast."""
    photo = _photographs()[rng.integers(len(_PHOTOS))]
    size = int(side * rng.uniform(0.6, 1.27))
    left, top = int(rng.integers(photo.width - size + 1)), int(rng.integers(photo.height - size + 1))
    box = (left, top, left + size, top + size)
    crop = np.asarray(photo.resize((side, side), Image.Resampling.BILINEAR, box=box), dtype=np.float32)
    crop = 0.65 * crop + 0.35 * crop.mean(-1, keepdims=True)
    return 128 + 0.75 * (crop - 128)


@lru_cache(maxsize=1)
def _photographs() -> tuple[Image.Image, ...]:
    from sklearn.datasets import load_sample_image

    return tuple(Image.fromarray(load_sample_image(name)) for name in _PHOTOS)


_PAINT = {
    "plain": _plain,
    "gradient": _gradient,
    "noise": _noise,
    "stripes": _stripes,
    "checks": _checks,
    "photo": _photo,
}
