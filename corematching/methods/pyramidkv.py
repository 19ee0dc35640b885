"""PyramidKV: SnapKV with more rows in the first layers and fewer in the last ones."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

from corematching.methods.base import AfterPrefill, Geometry, KeepKV, Method, Stage
from corematching.methods.kv import TIES, check_window, keep_best, kept_counts, window_scores
from corematching.methods.parameters import Budget, check_budget, check_choice, check_least
from corematching.methods.views import KVView


@dataclass(frozen=True)
class PyramidKV(Method):
    """PyramidKV (arXiv 2406.02069; repository Zefan-Cai/KVCache-Factory, ``pyramidkv/pyramidkv_utils.py``).

    Every layer keeps what the prompt's last ``window`` positions look at, as SnapKV does, but layers have budgets that
    fall in equal steps: beside the window, layer 0 gets up to 2 - 1/beta times the mean and the last layer 1/beta of
    it. Where that would be more than layer 0 has, it keeps all and the others share the rest.

    Steps are whole rows rounded down, as officially, so layers keep up to half a row per layer more than the budget on
    average. Differences from the official code: those of SnapKV here (sums in single precision, key heads shared by
    several query heads take their mean, sequence order); budgets not above the window, which it refuses, keep its most
    recent part in every layer.

    Parameters
    ----------
    keep
        KV rows to keep per head on average over the layers, window included: a count, or a fraction of the tokens that
        entered the layer. Prompts that are not longer stay whole.
    window, kernel, pooling, ties
        As SnapKV's.
    beta
        How steep the pyramid is; 1 = all layers alike.
    """

    keep: Budget
    window: int
    kernel: int
    pooling: str
    ties: str
    beta: int
    acts_on: ClassVar[frozenset[str]] = frozenset({"kv"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)
        check_choice("ties", self.ties, TIES)
        check_window(self.window, self.kernel, self.pooling)
        check_least("beta", self.beta)

    def stages(self, geometry: Geometry) -> list[Stage]:
        select = functools.partial(self.select, depth=geometry.depth)
        return [AfterPrefill(layer, select) for layer in range(geometry.depth)]

    def select(self, view: KVView, depth: int) -> KeepKV | None:
        means = kept_counts(view, self.keep)
        counts = [
            self.rows_of_layer(view.layer, depth, mean, length)
            for mean, length in zip(means, view.lengths, strict=True)
        ]
        if counts == view.lengths:
            return None
        smooth = window_scores(view, counts, self.window, self.kernel, self.pooling)
        return keep_best(smooth, view.lengths, counts, [min(self.window, count) for count in counts], self.ties)

    def rows_of_layer(self, layer: int, depth: int, mean: int, length: int) -> int:
        """Rows that a layer keeps of ``length`` ones, where all layers keep ``mean`` on average."""
        base = mean - self.window
        if mean >= length or base <= 0 or depth == 1 or length < 2 * base:
            return min(mean, length)
        last = base // self.beta
        first = 2 * base - last
        if first >= length - self.window:
            first = length - self.window
            last = 2 * base - first
        return first - layer * ((first - last) // (depth - 1)) + self.window
