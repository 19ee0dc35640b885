"""What a prompt's visual tokens are: the one description that fits every model family.

An image is a few *tiles*, each a grid of tokens in raster order: LLaVA-1.5 has one, LLaVA-NeXT the whole image small
(a thumbnail) and then its crops as one large grid, InternVL square crops and a thumbnail, Qwen-VL one grid of the
image's own shape. Some families end a tile, or each of its rows, with a *newline* token that shows no patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

KINDS = ("patch", "newline", "thumbnail", "frame")
"""Names of the kinds of visual tokens, by number."""
PATCH, NEWLINE, THUMBNAIL, FRAME = range(len(KINDS))


@dataclass(frozen=True)
class Tile:
    """One grid of an image's tokens.

    Attributes
    ----------
    rows, columns
        Tokens of the grid, newlines left out.
    kind
        What its tokens are: ``PATCH``, ``THUMBNAIL`` (a tile that shows again what others show) or ``FRAME`` (a time
        slice of a video).
    box
        (top, left, bottom, right) of what it shows, as shares of the image; None if the inputs do not tell.
    newline
        "row": a newline token ends every row; "tile": one ends the tile; "": there is none.
    """

    rows: int
    columns: int
    kind: int = PATCH
    box: tuple[float, float, float, float] | None = (0.0, 0.0, 1.0, 1.0)
    newline: str = ""

    @property
    def tokens(self) -> int:
        """Its tokens, newlines included."""
        return self.rows * self.columns + {"row": self.rows, "tile": 1, "": 0}[self.newline]


@dataclass(frozen=True)
class ImageTokens:
    """The visual tokens of one image.

    Attributes
    ----------
    tiles
        In the order of their tokens.
    patches
        (crops or frames, rows, columns): the patches that the vision tower sees, which are more than the tokens where
        patches are merged, padding is cut off, or features are resized.
    """

    tiles: tuple[Tile, ...]
    patches: tuple[int, int, int]

    @property
    def count(self) -> int:
        """Visual tokens."""
        return sum(tile.tokens for tile in self.tiles)


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """The visual tokens of several images, in the order of their placeholders; long [T] each, on the CPU.

    Attributes
    ----------
    images
        The images, in order.
    image
        Number of the token's image.
    tile
        Number of its tile in the image.
    kind
        Index into :data:`KINDS`.
    row, column
        Its place in the tile's grid; a newline stands behind its row's last column.
    """

    images: tuple[ImageTokens, ...]
    image: Tensor
    tile: Tensor
    kind: Tensor
    row: Tensor
    column: Tensor

    @classmethod
    def of(cls, images: Sequence[ImageTokens]) -> VisualTokens:
        """Describe the tokens of some images."""
        each = [_facts(image.tiles) for image in images]
        facts = torch.cat(each, 1) if each else torch.zeros(4, 0, dtype=torch.long)
        numbers = torch.arange(len(images)).repeat_interleave(torch.tensor([own.shape[1] for own in each]).long())
        return cls(tuple(images), numbers, *facts)

    def __len__(self) -> int:
        return len(self.image)

    @cached_property
    def counts(self) -> list[int]:
        """Visual tokens per image."""
        return [image.count for image in self.images]


@lru_cache(maxsize=256)
def _facts(tiles: tuple[Tile, ...]) -> Tensor:
    """Tile, kind, row and column of an image's tokens: long [4, n]."""
    parts = [torch.zeros(4, 0, dtype=torch.long)]
    for number, tile in enumerate(tiles):
        columns = tile.columns + (tile.newline == "row")
        row = torch.arange(tile.rows).repeat_interleave(columns)
        column = torch.arange(columns).repeat(tile.rows)
        kind = torch.where(column < tile.columns, tile.kind, NEWLINE)
        if tile.newline == "tile":
            row, column = torch.cat([row, row[-1:]]), torch.cat([column, column[-1:] + 1])
            kind = torch.cat([kind, torch.tensor([NEWLINE])])
        parts.append(torch.stack([torch.full_like(row, number), kind, row, column]))
    return torch.cat(parts, 1)
