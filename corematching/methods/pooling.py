"""Pooling control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from corematching.methods.base import Replace
from corematching.methods.control import Control
from corematching.methods.parameters import count_of, spread
from corematching.methods.views import ImageView, LayerView, TileView

Plan = list[tuple[TileView, tuple[int, int]]]
"""Tiles, and the grid (rows, columns) that each is pooled to."""


@dataclass(frozen=True)
class Pooling(Control):
    """Average neighbouring visual tokens on the patch grid: the control that keeps everything, blurred.

    The grid is average-pooled to ``r x c`` cells; where its sides are no multiples, windows overlap by one patch. A
    quarter of a square grid is the usual 2 x 2 average. A cell takes the position id of the patch at its centre, by
    which the trace lists it. Images of several tiles are pooled tile by tile, each with its share of the image's budget
    (one token at least).

    Parameters
    ----------
    keep
        Visual tokens to keep per image (count or fraction). Of the grids with at most that many cells the largest one
        is taken, the squarest among equals; so a prime above the grid's width is missed by a little.
    layer
        They are pooled at the input of this decoder layer; -1 = before the LLM.
    seed
        No effect: nothing is random. It is here so that all controls take the same parameters.
    """

    grids: ClassVar[bool] = True

    def select(self, view: LayerView) -> Replace | None:
        plans = [self.plan(images) for images in view.prompt.images]
        if all(cells == (tile.rows, tile.columns) for plan in plans for tile, cells in plan):
            return None
        device = view.hidden.device
        slots = [_centres(plan).to(device) for plan in plans]
        counts = [len(own) for own in slots]
        slot = torch.nn.utils.rnn.pad_sequence(slots, batch_first=True)
        pool = partial(_pooled, plans)
        hidden = pool(view.gather(view.hidden))
        return Replace(hidden, slot, counts=counts, mix=pool)

    def plan(self, images: Sequence[ImageView]) -> Plan:
        """Every tile of a sample, and the grid it is pooled to."""
        plan: Plan = []
        for image in images:
            tokens = [tile.rows * tile.columns for tile in image.tiles]
            shares = spread(max(count_of(self.keep, sum(tokens)), len(tokens)), tokens)
            pairs = zip(image.tiles, shares, strict=True)
            plan += [(tile, pooled_grid(share, tile.rows, tile.columns)) for tile, share in pairs]
        return plan


def _centres(plan: Plan) -> Tensor:
    """Long [K]: the visual slots at the centres of a sample's cells."""
    slots, first = [torch.zeros(0, dtype=torch.long)], 0
    for tile, (rows, columns) in plan:
        row = (torch.arange(rows) * 2 + 1) * tile.rows // (2 * rows)
        column = (torch.arange(columns) * 2 + 1) * tile.columns // (2 * columns)
        slots.append(first + (row[:, None] * tile.columns + column).flatten())
        first += tile.rows * tile.columns
    return torch.cat(slots)


def _pooled(plans: Sequence[Plan], values: Tensor) -> Tensor:
    """Per-token rows [B, V, c] of all tiles as their cells [B, K, c]."""
    samples = []
    for own, plan in zip(values, plans, strict=True):
        cells, first = [own[:0]], 0
        for tile, grid in plan:
            tokens = own[first : first + tile.rows * tile.columns].unflatten(0, (tile.rows, tile.columns))
            pooled = F.adaptive_avg_pool2d(tokens.permute(2, 0, 1)[None], grid)[0]
            cells.append(pooled.flatten(1).T)
            first += tile.rows * tile.columns
        samples.append(torch.cat(cells))
    return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)


def pooled_grid(keep: int, rows: int, columns: int) -> tuple[int, int]:
    """The largest grid of at most ``keep`` cells within ``rows x columns``; ties: squarest, then tallest."""
    grids = [(r, min(columns, keep // r)) for r in range(1, min(rows, keep) + 1)]
    return max(grids, key=lambda grid: (grid[0] * grid[1], -abs(grid[0] - grid[1]), grid[0]))
