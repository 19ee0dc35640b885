"""AdaKV: SnapKV whose heads share a layer's budget by how concentrated their attention is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corematching.errors import UserError
from corematching.methods.base import AfterPrefill, Geometry, KeepKV, Method, Stage
from corematching.methods.kv import check_window, distance_from_end, kept_counts, window_scores
from corematching.methods.parameters import Budget, check_budget
from corematching.methods.views import KVView


@dataclass(frozen=True)
class AdaKV(Method):
    """Ada-SnapKV (NeurIPS 2025, arXiv 2407.11550; repository FFY0/AdaKV, ``adaptive_snapkv/monkeypatch``).

    Scores are SnapKV's. A layer's budget beside the window is shared among its heads: each head counts how many of its
    scores are among the best of all heads together, and gets that number, mixed with ``floor`` of the even share. It
    keeps its own best rows.

    Decode steps attend head by head to as many rows as each head kept. Rows are stored padded to the longest head:
    steps read what the trace's ``rows_read`` say, memory holds what ``kv_bytes`` say.

    Differences from the official code: heads are the model's KV heads, with the mean of their query heads (as in its
    later versions); heads' shares are rounded so that they sum to the layer's budget exactly (there each is rounded by
    itself); no optional weighting of the scores, no layers that are skipped; equal scores prefer the lower position.

    Parameters
    ----------
    keep
        KV rows to keep per layer on average over the heads, window included: a count, or a fraction of the tokens that
        entered the layer. Prompts that are not longer stay whole.
    window, kernel, pooling
        As SnapKV's.
    floor
        Part of the even share that every head is sure of, in [0, 1]; 1 = all heads alike.
    """

    keep: Budget
    window: int
    kernel: int
    pooling: str
    floor: float
    acts_on: ClassVar[frozenset[str]] = frozenset({"kv"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)
        check_window(self.window, self.kernel, self.pooling)
        if not 0 <= self.floor <= 1:
            raise UserError(f"floor={self.floor} is not valid: give a fraction in [0, 1]")

    def stages(self, geometry: Geometry) -> list[Stage]:
        return [AfterPrefill(layer, self.select, ragged=True) for layer in range(geometry.depth)]

    def select(self, view: KVView) -> KeepKV | None:
        counts = kept_counts(view, self.keep)
        if counts == view.lengths:
            return None
        smooth = window_scores(view, counts, self.window, self.kernel, self.pooling)
        kept = distance_from_end(view.valid)[:, None] <= self.window
        kept = (kept & view.valid[:, None]).repeat(1, smooth.shape[1], 1)
        for row, (count, length) in enumerate(zip(counts, view.lengths, strict=True)):
            own = kept[row, :, -length:]
            if count == length:
                own[:] = True
            elif count <= self.window:
                own[:, : length - count] = False
            else:
                scores = smooth[row, :, -length : -self.window]
                shares = self.shares(scores, count - self.window)
                place = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
                own[:, : -self.window] = place < shares[:, None]
        width = int(kept.sum(2).max())
        # Unmarked positions sort to the front, where they pad the shorter heads.
        index = kept.to(torch.int8).argsort(dim=2, stable=True)[:, :, -width:]
        return KeepKV(index, kept.gather(2, index))

    def shares(self, scores: Tensor, base: int) -> Tensor:
        """Rows of each head, long [H], summing to ``H * base``, from its scores [H, n]."""
        heads, length = scores.shape
        order = scores.flatten().argsort(descending=True, stable=True)
        best = (order[: heads * base] // length).bincount(minlength=heads)
        exact = best.double() * (1 - self.floor) + base * self.floor
        whole = exact.floor().long()
        missing = heads * base - int(whole.sum())
        most_cut = (exact - whole).argsort(descending=True, stable=True)[:missing]
        return whole.index_add(0, most_cut, torch.ones_like(most_cut))
