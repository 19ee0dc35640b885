"""Seeded 336 x 336 scenes: coloured shapes, tiles with real handwritten digits, signs with rendered words.

A scene is a list of objects on a grid of 24 x 24 patches of 14 px, the patches of the LLaVA-1.5 vision tower. Objects
are two to four patches wide, so the answer to a question lies in a handful of the 576 visual tokens and a pruning
method has something to lose. Everything is a pure function of ``(split, seed)``; train and test scenes come from
disjoint random streams, and the handwritten digits themselves are split too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

IMAGE_SIZE = 336
PATCH = 14
GRID = IMAGE_SIZE // PATCH

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (30, 160, 60),
    "blue": (35, 75, 220),
    "yellow": (240, 220, 40),
    "purple": (140, 45, 180),
    "orange": (245, 135, 25),
    "white": (248, 248, 248),
    "black": (18, 18, 18),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
TEXTURES = ("plain", "striped", "dotted")
SIZES = ("small", "large")
DIGITS = tuple("0123456789")
WORDS = ("cat", "dog", "sun", "car", "tree", "fish", "bird", "book", "star", "moon", "cake", "ship")
SPLITS = ("train", "test")

DIGIT_SHARE = 0.26  # of the objects; seven in ten of the others are shapes, the rest words
_SHAPES_OF_REST = 0.52 / 0.74
_HELD_OUT_DIGITS = 5  # every fifth handwritten digit belongs to the test split


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One drawn object.

    Attributes
    ----------
    category : {"shape", "digit", "word"}
        A textured shape, a tile with one handwritten digit, or a sign with a word.
    kind : str
        The shape's name, the digit, or the word.
    colour : str
        A key of :data:`COLOURS`; no two objects of a scene share a colour.
    size : str
        One of :data:`SIZES`; signs are always ``"large"``.
    texture : str
        One of :data:`TEXTURES`; tiles and signs are always ``"plain"``.
    col, row, width, height : int
        The covered rectangle in patches.
    dx, dy : int
        Offset of the drawing within that rectangle in pixels, at most two in each direction.
    variant : int
        Which handwritten digit is drawn (an index into the split's digits of that class, taken modulo their number).
    """

    category: str
    kind: str
    colour: str
    size: str
    texture: str
    col: int
    row: int
    width: int
    height: int
    dx: int
    dy: int
    variant: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The covered rectangle in pixels, ``(x0, y0, x1, y1)``, ends exclusive."""
        return (self.col * PATCH, self.row * PATCH, (self.col + self.width) * PATCH, (self.row + self.height) * PATCH)

    @property
    def centre(self) -> tuple[float, float]:
        """Centre in patches, ``(x, y)``."""
        return (self.col + self.width / 2, self.row + self.height / 2)


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows; :func:`render` draws it.

    Attributes
    ----------
    seed, split : int, {"train", "test"}
        Where the scene comes from; together they name it.
    objects : tuple of SceneObject
        Three to six objects, pairwise at least one patch apart.
    background : tuple of int
        Grey level at the left and at the right edge.
    """

    seed: int
    split: str
    objects: tuple[SceneObject, ...]
    background: tuple[int, int]


def make_scene(seed: int, split: str) -> Scene:
    """Draw up the scene with this number.

    Parameters
    ----------
    seed : int
        Any non-negative number; equal numbers give equal scenes.
    split : {"train", "test"}
        The two splits use disjoint random streams and disjoint handwritten digits.

    Raises
    ------
    ValueError
        If `split` is neither ``"train"`` nor ``"test"``.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    rng = random.Random(f"{split}:{seed}")
    objects = place_objects(rng, rng.sample(tuple(COLOURS), rng.randint(3, 6)), GRID)
    return Scene(seed, split, objects, (rng.randint(95, 175), rng.randint(95, 175)))


def place_objects(
    rng: random.Random, colours: list[str], grid: int, digits: float = DIGIT_SHARE
) -> tuple[SceneObject, ...]:
    """One object for each colour, as far as they fit on a square of `grid` patches; words do not repeat."""
    words = rng.sample(WORDS, len(colours))
    taken = [[False] * grid for _ in range(grid)]
    objects = []
    for colour, word in zip(colours, words):
        category, kind, width, height, texture = _draw_kind(rng, word, digits)
        spot = _free_spot(rng, taken, width, height)
        if spot is None:
            continue
        size = SIZES[height > 2 or category == "word"]
        jitter = (rng.randint(-2, 2), rng.randint(-2, 2))
        objects.append(
            SceneObject(category, kind, colour, size, texture, *spot, width, height, *jitter, rng.randrange(10_000))
        )
    return tuple(objects)


def _draw_kind(rng: random.Random, word: str, digits: float) -> tuple[str, str, int, int, str]:
    """Category, kind, width, height (patches) and texture of a new object."""
    share = rng.random()
    side = rng.choice((2, 3))
    shapes = _SHAPES_OF_REST * (1 - digits)
    if share < shapes:
        return "shape", rng.choice(SHAPES), side, side, rng.choice(TEXTURES)
    if share < shapes + digits:
        return "digit", rng.choice(DIGITS), side, side, "plain"
    return "word", word, 4, 2, "plain"


def _free_spot(rng: random.Random, taken: list[list[bool]], width: int, height: int) -> tuple[int, int] | None:
    """A place with a free patch all round it (marked as taken), or None when fifty tries found none."""
    grid = len(taken)
    for _ in range(50):
        col, row = rng.randint(0, grid - width), rng.randint(0, grid - height)
        around = [
            (y, x)
            for y in range(max(row - 1, 0), min(row + height + 1, grid))
            for x in range(max(col - 1, 0), min(col + width + 1, grid))
        ]
        if any(taken[y][x] for y, x in around):
            continue
        for y in range(row, row + height):
            for x in range(col, col + width):
                taken[y][x] = True
        return col, row
    return None


def render(scene: Scene) -> Image.Image:
    """The scene as a 336 x 336 RGB image; equal scenes give equal pixels."""
    return Image.fromarray(render_array(scene))


def render_array(scene: Scene, grid: int = GRID) -> np.ndarray:
    """The scene's top-left `grid` x `grid` patches as an array of shape (14 * grid, 14 * grid, 3), dtype uint8."""
    side = grid * PATCH
    noise = np.random.default_rng([scene.seed, SPLITS.index(scene.split)])
    left, right = scene.background
    canvas = np.empty((side, side, 3), dtype=np.float32)
    canvas[:] = np.linspace(left, right, side, dtype=np.float32)[None, :, None]
    for item in scene.objects:
        _paint(canvas, item, scene.split)
    canvas += noise.standard_normal((side, side, 1), dtype=np.float32) * 6
    return canvas.clip(0, 255).astype(np.uint8)


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
        return _shape_mask(item.kind, size[0]), _texture_ink(item.texture, size[0])
    plate = np.zeros(size, dtype=np.float32)
    plate[1:-1, 1:-1] = 1
    if item.category == "digit":
        drawings = digit_drawings(split)[int(item.kind)]
        return plate, _digit_ink(split, int(item.kind), item.variant % len(drawings), size[0])
    return plate, _word_ink(item.kind, size)


@lru_cache(maxsize=64)
def _shape_mask(kind: str, side: int) -> np.ndarray:
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
