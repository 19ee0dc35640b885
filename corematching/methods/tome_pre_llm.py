"""ToMe before the LLM: merge projected visual tokens until the budget is met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import ClassVar

import torch
from torch import Tensor

from corematching.methods.base import Geometry, Merge, Method, Replace, Stage, VisionOutput
from corematching.methods.bipartite import Matching, bipartite_match, matching_flops
from corematching.methods.parameters import Budget, check_budget, check_count, count_of
from corematching.methods.selection import tokens_at
from corematching.methods.views import VisionView


@dataclass(frozen=True)
class ToMePreLLM(Method):
    """Token merging applied once between projector and LLM (the tower stays dense).

    Rounds of ToMe's bipartite soft matching (arXiv 2210.09461) run on the projected tokens until ``keep`` are left;
    each round merges at most half of them. The metric is the projected feature itself; means are weighted by size.
    This form is what papers on LLM-side pruning compare with under the name ToMe; there is no official code for it.

    Merged tokens are listed, ordered and positioned by the patch of the odd-position token they merged into.

    Parameters
    ----------
    keep
        Visual tokens to keep per image (count or fraction); met exactly.
    """

    keep: Budget
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)

    def stages(self, geometry: Geometry) -> list[Stage]:
        check_count("keep", self.keep, geometry.image_tokens)
        return [VisionOutput(self.select, projected=True, inside=False)]

    def select(self, view: VisionView) -> Replace | None:
        patches = view.features.shape[1]
        keep = count_of(self.keep, patches)
        if keep == patches:
            return None
        state = _unmerged(view.projected)
        rounds: list[Matching] = []
        while state.hidden.shape[1] > keep:
            matching = bipartite_match(state.hidden, state.hidden.shape[1] - keep, class_token=False)
            assert matching is not None  # two or more tokens always leave a pair to merge
            view.spend(matching_flops(*state.hidden.shape[1:]))
            rounds.append(matching)
            state = _after(state, matching)
        return Replace(state.hidden, state.origin, mix=partial(_merged, rounds))


def _unmerged(hidden: Tensor) -> Merge:
    sizes = torch.ones_like(hidden[..., :1], dtype=torch.float32)
    return Merge(hidden, sizes, torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2]))


def _after(state: Merge, matching: Matching) -> Merge:
    """One round; back to raster order, so that the next one pairs neighbours as the first one did."""
    merged = matching.merge(state.hidden, state.sizes, state.origin)
    order = merged.origin.argsort(dim=1)
    return Merge(tokens_at(merged.hidden, order), tokens_at(merged.sizes, order), merged.origin.gather(1, order))


def _merged(rounds: Sequence[Matching], rows: Tensor) -> Tensor:
    """Per-token rows [N, P, c] merged as the tokens were, round by round."""
    return reduce(_after, rounds, _unmerged(rows)).hidden
