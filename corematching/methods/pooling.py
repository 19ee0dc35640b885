"""Pooling control."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from corematching.methods.base import Replace
from corematching.methods.control import Control
from corematching.methods.parameters import count_of
from corematching.methods.views import LayerView


@dataclass(frozen=True)
class Pooling(Control):
    """Average neighbouring visual tokens on the patch grid: the control that keeps everything, blurred.

    The grid is average-pooled to ``r x c`` cells; where its sides are no multiples, windows overlap by one patch. A
    quarter of a square grid is the usual 2 x 2 average. A cell takes the position id of the patch at its centre, by
    which the trace lists it.

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

    def select(self, view: LayerView) -> Replace | None:
        rows, columns = view.prompt.grid
        patches = rows * columns
        to_rows, to_columns = pooled_grid(count_of(self.keep, patches), rows, columns)
        if (to_rows, to_columns) == (rows, columns):
            return None
        hidden = view.gather(view.hidden)
        images = hidden.unflatten(1, (-1, rows, columns)).permute(0, 1, 4, 2, 3).flatten(0, 1)
        cells = F.adaptive_avg_pool2d(images, (to_rows, to_columns)).flatten(2).transpose(1, 2)
        device = hidden.device
        row = (torch.arange(to_rows, device=device) * 2 + 1) * rows // (2 * to_rows)
        column = (torch.arange(to_columns, device=device) * 2 + 1) * columns // (2 * to_columns)
        centre = (row[:, None] * columns + column).flatten()
        first = torch.arange(0, hidden.shape[1], patches, device=device)
        slot = (first[:, None] + centre).flatten().expand(hidden.shape[0], -1)
        counts = [count // patches * len(centre) for count in view.visual_counts]
        return Replace(
            cells.unflatten(0, (hidden.shape[0], -1)).flatten(1, 2), view.origin.gather(1, slot), slot, counts
        )


def pooled_grid(keep: int, rows: int, columns: int) -> tuple[int, int]:
    """The largest grid of at most ``keep`` cells within ``rows x columns``; ties: squarest, then tallest."""
    grids = [(r, min(columns, keep // r)) for r in range(1, min(rows, keep) + 1)]
    return max(grids, key=lambda grid: (grid[0] * grid[1], -abs(grid[0] - grid[1]), grid[0]))
