"""CSP: attention within and across modalities is ranked apart before KV rows go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corematching.errors import UserError
from corematching.methods.base import AfterPrefill, Geometry, KeepKV, Method, Stage
from corematching.methods.kv import (
    asking,
    attention_received,
    check_recent,
    distance_from_end,
    keep_marked,
    kept_counts,
    per_row,
    recent_counts,
)
from corematching.methods.parameters import Budget
from corematching.methods.views import KVView


@dataclass(frozen=True)
class CSP(Method):
    """Cross-Self Pruning (arXiv 2412.04652; repository TerryPei/CSP).

    After prefill, in every layer and head, the last ``recent`` positions observe the earlier ones through a softmax
    with one added to its denominator. Attention between positions of the same modality (image-image, text-text) and
    of different ones is summed over the observers separately; each part keeps its own best positions, and the last
    ``recent`` positions stay.

    **Deviation by default**: the official code may pick a position in both parts and then stores it twice, which
    doubles its weight and wastes a row. Here the within-modality part chooses among what the cross part left, so that
    ``keep`` is met exactly. ``deduplicate=False`` is the official behaviour; both parts' counts are then truncated
    separately, so one row fewer than ``keep`` may stay.

    Parameters
    ----------
    keep
        KV rows to keep per layer and head, recent ones included: a count, or a fraction of the tokens that entered
        the layer. Prompts that are not longer stay whole.
    recent
        How many of them are the last positions, which are also the observers (count or fraction, likewise); None =
        half.
    cross_fraction
        Share of the other kept rows that the cross-modality part chooses (in [0, 1]).
    bias
        Positions among the last ``recent * bias`` cannot be chosen by the two parts.
    deduplicate
        False reproduces the official duplicates.
    """

    keep: Budget
    recent: Budget | None
    cross_fraction: float
    bias: float
    deduplicate: bool
    acts_on: ClassVar[frozenset[str]] = frozenset({"kv"})

    def __post_init__(self) -> None:
        check_recent(self.keep, self.recent)
        if not 0 <= self.cross_fraction <= 1:
            raise UserError(f"cross_fraction={self.cross_fraction} is not valid: give a fraction in [0, 1]")
        if self.bias < 0:
            raise UserError(f"bias={self.bias} is not valid: give a number >= 0")

    def stages(self, geometry: Geometry) -> list[Stage]:
        return [AfterPrefill(layer, self.select) for layer in range(geometry.depth)]

    def select(self, view: KVView) -> KeepKV | None:
        totals = kept_counts(view, self.keep)
        if totals == view.lengths:
            return None
        recent = recent_counts(view, totals, self.recent)
        cross_sums, self_sums = modality_sums(view, asking(view, totals, recent))
        parts = [self.shares(*numbers) for numbers in zip(totals, recent, view.lengths, strict=True)]
        cross, within, recent, barred = (list(column) for column in zip(*parts, strict=True))

        from_end = distance_from_end(view.valid)
        candidate = (view.valid & (from_end > per_row(barred, from_end)))[:, None]
        cross_order, cross_marked = _ranked(cross_sums, candidate, cross)
        if self.deduplicate:
            candidate = candidate & ~torch.zeros_like(cross_marked).scatter(2, cross_order, cross_marked)
        self_order, self_marked = _ranked(self_sums, candidate, within)
        last = ((from_end <= per_row(recent, from_end)) & view.valid)[:, None].expand_as(cross_marked)
        places = torch.arange(view.valid.shape[1], device=from_end.device).expand_as(cross_order)
        counts = [sum(part[:3]) for part in parts]
        return keep_marked(
            torch.cat([cross_marked, self_marked, last], 2), counts, torch.cat([cross_order, self_order, places], 2)
        )

    def shares(self, total: int, recent: int, length: int) -> tuple[int, int, int, int]:
        """One sample's counts: chosen across and within modalities, recent, and last positions barred from choice."""
        if total == length:
            return 0, 0, length, 0  # no longer than its budget: stays whole while others in the batch are cut
        barred = max(int(recent * self.bias), recent if self.deduplicate else 0)
        heavy = min(total - recent, length - barred)
        cross = int(heavy * self.cross_fraction)
        return cross, heavy - cross if self.deduplicate else int(heavy * (1 - self.cross_fraction)), recent, barred


def modality_sums(view: KVView, recent: list[int]) -> tuple[Tensor, Tensor]:
    """Attention from the last ``recent`` positions, summed by whether it crosses modalities: two [B, H_kv, n]."""
    rows = max(recent)
    observes = view.valid[:, -rows:] & (distance_from_end(view.valid)[:, -rows:] <= per_row(recent, view.valid))
    is_visual = view.visual_mask[:, -rows:]
    weights = torch.stack([observes & is_visual, observes & ~is_visual], 2)
    from_visual, from_text = attention_received(view, recent, weights, plus_one=True).unbind(2)
    to_visual = view.visual_mask[:, None]
    return torch.where(to_visual, from_text, from_visual), torch.where(to_visual, from_visual, from_text)


def _ranked(scores: Tensor, allowed: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Positions by descending score (long [B, H, n]) and which of them are chosen (bool [B, H, n])."""
    order = scores.masked_fill(~allowed, -torch.inf).argsort(dim=2, descending=True, stable=True)
    rank = torch.arange(scores.shape[2], device=scores.device)
    return order, (rank < per_row(counts, scores))[:, None].expand_as(scores)
