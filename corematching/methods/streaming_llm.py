"""StreamingLLM: attention sinks and the most recent positions stay in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from corematching.methods.base import AfterPrefill, Geometry, KeepKV, Method, Stage
from corematching.methods.kv import check_recent, distance_from_end, keep_marked, kept_counts, per_row
from corematching.methods.parameters import Budget, count_of
from corematching.methods.views import KVView

SINKS = 4
"""First positions kept by default, as in the paper."""


@dataclass(frozen=True)
class StreamingLLM(Method):
    """StreamingLLM (ICLR 2024, arXiv 2309.17453; repository mit-han-lab/streaming-llm).

    After prefill, every layer and head keeps the first positions of the prompt (attention sinks) and the last ones.

    Difference from the official code: it rolls the window on during decode and re-assigns positions within the cache;
    here the prompt's cache is cut once, decoded tokens are added, and all positions stay the original ones.

    Parameters
    ----------
    keep
        KV rows to keep per layer and head: a count, or a fraction of the tokens that entered the layer. Prompts that
        are not longer stay whole.
    recent
        How many of them are the last positions; the others are the first ones. None = all but four.
    """

    keep: Budget
    recent: Budget | None
    acts_on: ClassVar[frozenset[str]] = frozenset({"kv"})

    def __post_init__(self) -> None:
        check_recent(self.keep, self.recent)

    def stages(self, geometry: Geometry) -> list[Stage]:
        return [AfterPrefill(layer, self.select) for layer in range(geometry.depth)]

    def select(self, view: KVView) -> KeepKV | None:
        counts = kept_counts(view, self.keep)
        if counts == view.lengths:
            return None
        recent = [self._recent(count, length) for count, length in zip(counts, view.lengths, strict=True)]
        sinks = [count - last for count, last in zip(counts, recent, strict=True)]
        from_start = view.valid.long().cumsum(1)
        marked = (from_start <= per_row(sinks, from_start)) & view.valid
        marked |= distance_from_end(view.valid) <= per_row(recent, from_start)
        return keep_marked(marked[:, None].expand(-1, view.keys.shape[1], -1), counts)

    def _recent(self, count: int, length: int) -> int:
        if self.recent is None:
            return max(count - SINKS, 0)
        return min(count, count_of(self.recent, length))
