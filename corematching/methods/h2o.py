"""H2O: the positions that received most attention, and the most recent ones, stay in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from corematching.methods.base import AfterPrefill, Geometry, KeepKV, Method, Stage
from corematching.methods.kv import (
    TIES,
    asking,
    attention_received,
    check_recent,
    keep_best,
    kept_counts,
    recent_counts,
)
from corematching.methods.parameters import Budget, check_choice
from corematching.methods.views import KVView


@dataclass(frozen=True)
class H2O(Method):
    """Heavy-Hitter Oracle (NeurIPS 2023, arXiv 2306.14048; repository FMInference/H2O).

    After prefill, every layer and head sums the attention each position received from all prompt positions, keeps the
    last ``recent`` positions and the heaviest of the others. Attention is recomputed a few query rows at a time.

    Differences from the official code: it goes on evicting one row per decoded token, here the prompt's cache is cut
    once and decoded tokens are added; key heads shared by several query heads take their mean. Equal sums are told
    apart as ``torch.topk`` does, as there; ``ties="first"`` prefers the lower position.

    Parameters
    ----------
    keep
        KV rows to keep per layer and head, recent ones included: a count, or a fraction of the tokens that entered
        the layer. Prompts that are not longer stay whole.
    recent
        How many of them are the last positions (count or fraction, likewise); None = half.
    ties
        "topk" or "first".
    """

    keep: Budget
    recent: Budget | None
    ties: str
    acts_on: ClassVar[frozenset[str]] = frozenset({"kv"})

    def __post_init__(self) -> None:
        check_recent(self.keep, self.recent)
        check_choice("ties", self.ties, TIES)

    def stages(self, geometry: Geometry) -> list[Stage]:
        return [AfterPrefill(layer, self.select) for layer in range(geometry.depth)]

    def select(self, view: KVView) -> KeepKV | None:
        counts = kept_counts(view, self.keep)
        if counts == view.lengths:
            return None
        recent = recent_counts(view, counts, self.recent)
        received = attention_received(view, asking(view, counts, view.lengths), view.valid[..., None])[:, :, 0]
        return keep_best(received, view.lengths, counts, recent, self.ties)
