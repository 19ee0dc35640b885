"""RefreshKV: a small cache that most steps read, made anew from the full one now and then."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cosine_similarity, max_pool1d

from corematching.errors import UserError
from corematching.methods.base import ChooseRows, Geometry, Method, ReadRows, Stage
from corematching.methods.kv import check_kernel
from corematching.methods.parameters import Budget, check_budget
from corematching.methods.rows import row_budget, strongest_of_group, with_own_row
from corematching.methods.views import PromptRowsView, StepView


@dataclass(frozen=True)
class _Small:
    """One layer's small cache."""

    rows: Tensor
    """Long [H_kv, k]: its rows, the next one to be evicted first."""
    most: int
    """Rows it may hold between steps."""
    query: Tensor | None
    """[hd] the mean over heads of the query when it was made."""


@dataclass(frozen=True)
class RefreshKV(Method):
    """RefreshKV (ACL 2025, arXiv 2411.05787; the official repository carriex/refreshkv holds no code yet).

    All KV rows stay. Every layer has a small cache of the rows that the prompt's last token attends to most: by KV head
    the largest attention of its query heads, smoothed by a maximum over neighbours. A *partial* step reads these rows
    and its own; its own row joins them and the one with the least score leaves. Every so many steps a layer compares
    the step's query (mean over heads, before rotary embedding) with that of its last full step: if they are not alike
    it takes a *full* step, reads everything, and makes the small cache anew from that step's attention.

    Where the paper leaves something open this follows the unofficial Min-DongYoung/refreshkv_implementation: rows
    decoded since have no score and leave after all others; queries are compared before rotary embedding. Differences
    from it: every layer decides for itself, as in the paper (there, the least similar layer decides for all); each KV
    head has rows of its own (there, one set per layer); the step's own row may be among those chosen anew; an equal
    similarity does not refresh. ``every=1`` makes every step full whatever the similarity, and so is dense.

    Parameters
    ----------
    keep
        Rows of the small cache: a count, or a fraction of the rows after prefill.
    every
        Steps from one comparison to the next; null = never, so that the prompt's choice stays but for evictions.
    similarity
        Cosine below which a full step is taken; null = take one at every comparison.
    kernel
        Width of the maximum over neighbouring positions, odd; 1 = none.
    """

    keep: Budget
    every: int | None
    similarity: float | None
    kernel: int
    acts_on: ClassVar[frozenset[str]] = frozenset({"kv"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)
        if self.every is not None and self.every < 1:
            raise UserError(f"every={self.every} is not valid: give a count >= 1, or null for never")
        if self.similarity is not None and not -1 <= self.similarity <= 1:
            raise UserError(f"similarity={self.similarity} is not valid: give a cosine in [-1, 1], or null")
        check_kernel(self.kernel)

    def stages(self, geometry: Geometry) -> list[Stage]:
        compares = self._compares
        return [ChooseRows(layer, self.choose, self.begin, unrotated=compares) for layer in range(geometry.depth)]

    @property
    def _compares(self) -> bool:
        return self.every not in (None, 1) and self.similarity is not None

    def begin(self, view: PromptRowsView) -> None:
        most = row_budget(self.keep, view.rows)
        query = view.unrotated_queries(1)[:, 0].float().mean(0) if self._compares else None
        rows = self._strongest(view.attention(1)[:, 0], len(view.keys), most)
        view.memory[view.layer] = _Small(rows, most, query)

    def choose(self, view: StepView) -> ReadRows | None:
        small: _Small = view.memory[view.layer]
        if self.every is not None and (view.step + 1) % self.every == 0:
            query = view.unrotated_query.float().mean(0) if self._compares else None
            if query is None or self._differ(query, small.query):
                rows = self._strongest(view.attention(), len(view.keys), small.most)
                view.memory[view.layer] = _Small(rows, small.most, query)
                return None
        rows = with_own_row(small.rows, view.rows)
        view.memory[view.layer] = replace(small, rows=rows[:, max(0, rows.shape[1] - small.most) :])
        return None if rows.shape[1] == view.rows else ReadRows(rows)

    def _differ(self, query: Tensor, before: Tensor | None) -> bool:
        assert before is not None
        assert self.similarity is not None
        return bool(cosine_similarity(query, before, dim=0) < self.similarity)

    def _strongest(self, attention: Tensor, kv_heads: int, most: int) -> Tensor:
        """Long [H_kv, K]: the rows with most attention [H, n], the weakest first."""
        scores = strongest_of_group(attention, kv_heads)
        scores = max_pool1d(scores, self.kernel, stride=1, padding=self.kernel // 2)
        return scores.topk(min(most, scores.shape[1]), dim=1).indices.flip(1)
