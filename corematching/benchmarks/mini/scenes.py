"""Seeded 336 x 336 scenes: coloured shapes, tiles with real handwritten digits, signs with rendered words, distractors.

A scene is a list of objects on a grid of 24 x 24 patches of 14 px, the patches of the LLaVA-1.5 vision tower, before a
varied background. Objects are one to six patches wide, so the answer to a question lies in a handful of the 576 visual
tokens and a pruning method has something to lose. Distractors have shapes and colours that no question names.
Everything is a pure function of ``(split, seed)``; train and test scenes come from disjoint random streams, and the
handwritten digits themselves are split too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from corematching.benchmarks.mini.backgrounds import PATCH

IMAGE_SIZE = 336
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
ODD_COLOURS: dict[str, tuple[int, int, int]] = {
    "pink": (240, 150, 185),
    "brown": (115, 75, 45),
    "cyan": (90, 205, 215),
    "olive": (125, 125, 55),
    "grey": (130, 130, 130),
}
ODD_SHAPES = ("bar", "diamond", "arch", "ell")

DIGIT_SHARE = 0.26  # of the objects; seven in ten of the others are shapes, the rest words
_SHAPES_OF_REST = 0.52 / 0.74
# Patches: how often objects have which size. About half of shapes and digits are small, that is at most two wide.
_SHAPE_SIDES = {1: 3, 2: 12, 3: 7, 4: 5, 5: 3, 6: 1}
_DIGIT_SIDES = {2: 5, 3: 3, 4: 2}
_SIGNS = {(4, 2): 5, (5, 2): 3, (6, 3): 2}
_ODD_SIDES = {1: 2, 2: 3, 3: 1}


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
        One of :data:`SIZES`: three patches wide or more is large; signs are always ``"large"``.
    texture : str
        One of :data:`TEXTURES`; tiles, signs and shapes of a single patch are always ``"plain"``.
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
class Distractor:
    """A thing that no question names: one of :data:`ODD_SHAPES` in one of :data:`ODD_COLOURS`, `side` patches wide."""

    kind: str
    colour: str
    col: int
    row: int
    side: int


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows; :func:`corematching.benchmarks.mini.drawing.render` draws it.

    Attributes
    ----------
    seed, split : int, {"train", "test"}
        Where the scene comes from; together they name it and its background.
    objects : tuple of SceneObject
        Five to seven objects, pairwise at least one patch apart.
    distractors : tuple of Distractor
        Two to six more things, apart from the objects and from each other.
    """

    seed: int
    split: str
    objects: tuple[SceneObject, ...]
    distractors: tuple[Distractor, ...] = ()


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
    return Scene(seed, split, *place(rng, rng.sample(tuple(COLOURS), rng.randint(5, 7)), rng.randint(2, 6), GRID))


def place(
    rng: random.Random, colours: list[str], odd: int, grid: int, digits: float = DIGIT_SHARE
) -> tuple[tuple[SceneObject, ...], tuple[Distractor, ...]]:
    """One object for each colour and `odd` distractors, as far as they fit on a square of `grid` patches.

    Words do not repeat.
    """
    words = rng.sample(WORDS, len(colours))
    taken = [[False] * grid for _ in range(grid)]
    objects, distractors = [], []
    for colour, word in zip(colours, words):
        category, kind, width, height, texture = _draw_kind(rng, word, digits)
        spot = _free_spot(rng, taken, width, height)
        if spot is None:
            continue
        size = SIZES[height > 2 or category == "word"]
        reach = 1 if width == 1 else 2
        jitter = (rng.randint(-reach, reach), rng.randint(-reach, reach))
        objects.append(
            SceneObject(category, kind, colour, size, texture, *spot, width, height, *jitter, rng.randrange(10_000))
        )
    for _ in range(odd):
        side = _weighted(rng, _ODD_SIDES)
        spot = _free_spot(rng, taken, side, side)
        if spot is not None:
            distractors.append(Distractor(rng.choice(ODD_SHAPES), rng.choice(tuple(ODD_COLOURS)), *spot, side))
    return tuple(objects), tuple(distractors)


def _weighted(rng: random.Random, weights: dict):
    return rng.choices(tuple(weights), tuple(weights.values()))[0]


def _draw_kind(rng: random.Random, word: str, digits: float) -> tuple[str, str, int, int, str]:
    """Category, kind, width, height (patches) and texture of a new object."""
    share = rng.random()
    shapes = _SHAPES_OF_REST * (1 - digits)
    if share < shapes:
        side = _weighted(rng, _SHAPE_SIDES)
        return "shape", rng.choice(SHAPES), side, side, rng.choice(TEXTURES) if side > 1 else "plain"
    if share < shapes + digits:
        side = _weighted(rng, _DIGIT_SIDES)
        return "digit", rng.choice(DIGITS), side, side, "plain"
    return "word", word, *_weighted(rng, _SIGNS), "plain"


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
