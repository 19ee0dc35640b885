"""FastV: drop visual tokens that the last prompt position does not look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from corematching.methods.base import BeforeLayer, Geometry, Keep, Method, Stage
from corematching.methods.parameters import Budget, check_budget, check_count, place
from corematching.methods.selection import keep_top
from corematching.methods.views import LayerView


@dataclass(frozen=True)
class FastV(Method):
    """FastV (ECCV 2024, arXiv 2403.06764; repository pkunlp-icler/FastV).

    Visual tokens are ranked by the attention that the last prompt position pays them in layer ``layer - 1``, mean over
    heads; all but the top ``keep`` leave at the input of ``layer``. Kept tokens keep their order and position ids.
    The choice made in prefill stays for the whole answer, as in the official cached variants.

    Differences from the official code: only the needed query row is computed, so fused attention stays on; the visual
    span comes from the input ids instead of constants (the official scripts pass 36 for a 35-token prefix).

    Parameters
    ----------
    layer
        K of the paper: layers 0..K-1 see all tokens.
    keep
        Visual tokens to keep per sample (count, or fraction truncated as in the official code).
    depth_fraction
        Gives ``layer`` as a fraction of the model's depth instead.
    """

    layer: int
    keep: Budget
    depth_fraction: float | None
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)

    def stages(self, geometry: Geometry) -> list[Stage]:
        check_count("keep", self.keep, geometry.image_tokens)
        return [BeforeLayer(place(self.layer, self.depth_fraction, geometry.depth, first=1), self.select)]

    def select(self, view: LayerView) -> Keep:
        attention = view.attention(view.layer - 1).mean(1)[:, 0]
        return keep_top(view.gather(attention), self.keep, view.visual_valid, view.visual_counts)
