"""SnapKV: what the last positions of the prompt look at stays in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from corematching.methods.base import AfterPrefill, Geometry, KeepKV, Method, Stage
from corematching.methods.kv import TIES, check_window, keep_best, kept_counts, window_scores
from corematching.methods.parameters import Budget, check_budget, check_choice
from corematching.methods.views import KVView


@dataclass(frozen=True)
class SnapKV(Method):
    """SnapKV (NeurIPS 2024, arXiv 2404.14469; repository FasterDecoding/SnapKV).

    After prefill, every layer and head sums the attention that each earlier position receives from the last ``window``
    positions, smooths the sums along the sequence, and keeps the best positions together with the window.

    Smoothing pads with zeros beyond the first position and before the window (as "avg" does officially; for "max" it
    makes no difference). "max" makes plateaus of equal scores, of which a budget often cuts one: what stays of it is
    what ``torch.topk`` returns, as in the official code; ``ties="first"`` keeps its lower positions, the same on every
    device.

    Differences from the official code: sums are in single precision whatever the model's; key heads shared by
    several query heads take their mean (the official code repeats the cache per query head); the cache keeps
    sequence order.

    Parameters
    ----------
    keep
        KV rows to keep per layer and head, window included: a count, or a fraction of the tokens that entered the
        layer. Prompts that are not longer stay whole.
    window
        Positions at the end of the prompt that observe and always stay; of budgets below it, the most recent part.
    kernel
        Width of the smoothing, odd; 1 = none.
    pooling
        "avg" or "max".
    ties
        "topk" or "first".
    """

    keep: Budget
    window: int
    kernel: int
    pooling: str
    ties: str
    acts_on: ClassVar[frozenset[str]] = frozenset({"kv"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)
        check_choice("ties", self.ties, TIES)
        check_window(self.window, self.kernel, self.pooling)

    def stages(self, geometry: Geometry) -> list[Stage]:
        return [AfterPrefill(layer, self.select) for layer in range(geometry.depth)]

    def select(self, view: KVView) -> KeepKV | None:
        counts = kept_counts(view, self.keep)
        if counts == view.lengths:
            return None
        smooth = window_scores(view, counts, self.window, self.kernel, self.pooling)
        # A budget below the window keeps its most recent part.
        return keep_best(smooth, view.lengths, counts, [min(self.window, count) for count in counts], self.ties)
