"""CSP: attention within and across modalities is ranked apart before KV rows go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corematching.errors import UserError
from corematching.methods.base import AfterPrefill, Geometry, KeepKV, Method, Stage
from corematching.methods.kv import (
    TIES,
    asking,
    attention_received,
    check_recent,
    distance_from_end,
    keep_marked,
    kept_counts,
    marks,
    per_row,
    ranked,
    recent_counts,
)
from corematching.methods.parameters import Budget, check_choice
from corematching.methods.views import KVView


@dataclass(frozen=True)
class CSP(Method):
    """Cross-Self Pruning (arXiv 2412.04652; repository TerryPei/CSP).

    After prefill, in every layer and head, the last ``recent`` positions observe the earlier ones through a softmax
    with one added to its denominator. Attention between positions of the same modality (image-image, text-text) and
    of different ones is summed over the observers separately; each part keeps its own best positions, and the last
    ``recent * bias`` positions stay. What the cache holds then is, in this order, the within-modality part, the
    cross-modality part and the last positions. Prompts without an image stay whole, as in the official code.

    **Deviation by default**: the official code may pick a position in both parts and then stores it twice, which
    doubles its weight and wastes a row. Here the cross-modality part chooses among what the within-modality part left,
    so that ``keep`` is met exactly. ``deduplicate=False`` is the official behaviour: both parts' counts are truncated
    separately, so one row fewer than ``keep`` may stay; and with ``cross_fraction=0`` the official code has a constant,
    1 position across and 308 within whatever the budget (apparently a leftover), which is followed then.

    Other differences from the official code: key heads shared by several query heads take their mean; a prompt of
    exactly ``keep`` tokens stays whole (there it still goes through the choice).

    Parameters
    ----------
    keep
        KV rows to keep per layer and head, last ones included: a count, or a fraction of the tokens that entered the
        layer. Prompts that are not longer stay whole.
    recent
        How many positions observe, the last ones (count or fraction, likewise); None = half of ``keep``.
    cross_fraction
        Share of the chosen rows that the cross-modality part chooses (in [0, 1]).
    bias
        The last ``recent * bias`` positions stay, and what remains of ``keep`` is chosen among the others.
    deduplicate
        False reproduces the official duplicates.
    ties
        Which of equal scores wins: as ``torch.topk`` has it, like the official code ("topk"), or the lower position
        ("first").
    """

    keep: Budget
    recent: Budget | None
    cross_fraction: float
    bias: float
    deduplicate: bool
    ties: str
    acts_on: ClassVar[frozenset[str]] = frozenset({"kv"})

    def __post_init__(self) -> None:
        check_recent(self.keep, self.recent)
        if not 0 <= self.cross_fraction <= 1:
            raise UserError(f"cross_fraction={self.cross_fraction} is not valid: give a fraction in [0, 1]")
        check_choice("ties", self.ties, TIES)
        if self.bias < 0:
            raise UserError(f"bias={self.bias} is not valid: give a number >= 0")

    def stages(self, geometry: Geometry) -> list[Stage]:
        return [AfterPrefill(layer, self.select) for layer in range(geometry.depth)]

    def select(self, view: KVView) -> KeepKV | None:
        totals = [
            keep if seen else length
            for keep, seen, length in zip(kept_counts(view, self.keep), view.visual_counts, view.lengths, strict=True)
        ]
        if totals == view.lengths:
            return None
        recent = recent_counts(view, totals, self.recent)
        cross_sums, self_sums = modality_sums(view, asking(view, totals, [max(own, 1) for own in recent]))
        parts = [self.shares(*numbers) for numbers in zip(totals, recent, view.lengths, strict=True)]
        within, cross, last = (list(column) for column in zip(*parts, strict=True))

        n = view.valid.shape[1]
        earlier = [range(n - length, n - own) for length, own in zip(view.lengths, last, strict=True)]
        chosen, own = ranked(self_sums, earlier, within, self.ties)
        if self.deduplicate:
            cross_sums = cross_sums.masked_fill(marks(chosen, own, n), -torch.inf)
        across, own_across = ranked(cross_sums, earlier, cross, self.ties)
        places = torch.arange(n, device=chosen.device).expand(*chosen.shape[:2], n)
        end = places >= n - per_row(last, chosen)[:, None]
        return keep_marked(
            torch.cat([own, own_across, end], 2), [sum(part) for part in parts], torch.cat([chosen, across, places], 2)
        )

    def shares(self, total: int, recent: int, length: int) -> tuple[int, int, int]:
        """One sample's counts: chosen within and across modalities, and last positions that stay."""
        if total == length:
            return 0, 0, length  # stays whole while others in the batch are cut
        last = min(total, int(recent * self.bias))
        heavy, candidates = total - last, length - last
        if self.deduplicate:
            cross = int(heavy * self.cross_fraction)
            return heavy - cross, cross, last
        if self.cross_fraction == 0:
            return min(308, candidates), min(1, candidates), last
        return int(heavy * (1 - self.cross_fraction)), int(heavy * self.cross_fraction), last


def modality_sums(view: KVView, recent: list[int]) -> tuple[Tensor, Tensor]:
    """Attention from the last ``recent`` positions, summed by whether it crosses modalities: two [B, H_kv, n]."""
    rows = max(recent)
    observes = view.valid[:, -rows:] & (distance_from_end(view.valid)[:, -rows:] <= per_row(recent, view.valid))
    is_visual = view.visual_mask[:, -rows:]
    weights = torch.stack([observes & is_visual, observes & ~is_visual], 2)
    from_visual, from_text = attention_received(view, recent, weights, plus_one=True).unbind(2)
    to_visual = view.visual_mask[:, None]
    return torch.where(to_visual, from_text, from_visual), torch.where(to_visual, from_visual, from_text)
