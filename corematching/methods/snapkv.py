"""SnapKV: what the last positions of the prompt look at stays in the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from corematching.errors import UserError
from corematching.methods.base import AfterPrefill, Geometry, KeepKV, Method, Stage
from corematching.methods.kv import TIES, asking, attention_received, distance_from_end, keep_best, kept_counts
from corematching.methods.parameters import Budget, check_budget, check_choice
from corematching.methods.views import KVView

POOLINGS: dict[str, Callable[..., Tensor]] = {"avg": avg_pool1d, "max": max_pool1d}


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
        check_choice("pooling", self.pooling, tuple(POOLINGS))
        check_choice("ties", self.ties, TIES)
        if self.window < 1:
            raise UserError(f"window={self.window!r} is not valid: give a count >= 1")
        if self.kernel % 2 != 1 or self.kernel < 1:
            raise UserError(f"kernel={self.kernel!r} is not valid: give an odd count >= 1")

    def stages(self, geometry: Geometry) -> list[Stage]:
        return [AfterPrefill(layer, self.select) for layer in range(geometry.depth)]

    def select(self, view: KVView) -> KeepKV | None:
        counts = kept_counts(view, self.keep)
        if counts == view.lengths:
            return None
        rows = asking(view, counts, [min(self.window, length) for length in view.lengths])
        received = attention_received(view, rows, view.valid[:, -max(rows) :, None])[:, :, 0]
        received = received.masked_fill(distance_from_end(view.valid)[:, None] <= self.window, 0)
        smooth = POOLINGS[self.pooling](received, self.kernel, stride=1, padding=self.kernel // 2)
        # A budget below the window keeps its most recent part.
        return keep_best(smooth, view.lengths, counts, [min(self.window, count) for count in counts], self.ties)
