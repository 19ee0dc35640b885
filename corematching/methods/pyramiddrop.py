"""PyramidDrop: drop more visual tokens the deeper the layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from corematching.errors import UserError
from corematching.methods.base import BeforeLayer, Geometry, Keep, Method, Stage
from corematching.methods.parameters import Budget, check_budget, check_count, check_falling, check_layer
from corematching.methods.selection import keep_top
from corematching.methods.views import LayerView


@dataclass(frozen=True)
class PyramidDrop(Method):
    """PyramidDrop (CVPR 2025, arXiv 2410.17247; repository Cooperx521/PyramidDrop).

    At the input of every layer in ``layers``, visual tokens are ranked by the attention that the last prompt position
    pays them under *that layer's own* projections (mean over heads), and the share ``keeps`` of the original number
    goes on. Remaining tokens get new position ids 0..n-1; decoded tokens continue from each layer's own length.

    Differences from the official code: none in what is kept. The official code also cuts every shortened sequence to
    the tokenizer's maximum length, which has no effect on prompts that fit the model.

    Parameters
    ----------
    layers
        Decoder layers at whose input tokens leave, ascending.
    keeps
        One budget per layer: a fraction of the *original* number of visual tokens (truncated), or a count.
    """

    layers: tuple[int, ...]
    keeps: tuple[Budget, ...]
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        if not self.layers or len(self.layers) != len(self.keeps):
            raise UserError(f"keeps={list(self.keeps)} is not valid: give one for each of layers={list(self.layers)}")
        for keep in self.keeps:
            check_budget("keeps", keep)

    def stages(self, geometry: Geometry) -> list[Stage]:
        check_falling("keeps", self.keeps, geometry.image_tokens)
        stages: list[BeforeLayer] = []
        for layer, keep in zip(self.layers, self.keeps, strict=True):
            check_layer("layers", layer, geometry.depth, first=stages[-1].layer + 1 if stages else 0)
            check_count("keeps", keep, geometry.image_tokens)
            stages.append(BeforeLayer(layer, partial(select, keep), renumber=True))
        return list(stages)


def select(keep: Budget, view: LayerView) -> Keep:
    """The best ``keep`` of the original visual tokens by the last position's attention in the coming layer."""
    attention = view.attention(view.layer).mean(1)[:, 0]
    return keep_top(
        view.gather(attention), keep, view.visual_valid, view.visual_counts, totals=view.prompt.image_counts
    )
