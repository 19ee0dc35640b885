"""Random control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from corematching.methods.base import BeforeLayer, Geometry, Keep, Method, Stage
from corematching.methods.parameters import Budget, check_budget, check_count, check_layer
from corematching.methods.selection import hashed_noise, keep_top, sample_keys
from corematching.methods.views import LayerView


@dataclass(frozen=True)
class Random(Method):
    """Keep random visual tokens: the control every score has to beat.

    The subset depends on the seed and on the prompt's text, not on the sample's place in a batch. Kept tokens keep
    their original position ids.

    Parameters
    ----------
    keep
        Visual tokens to keep per sample (count or fraction).
    layer
        They leave at the input of this decoder layer; -1 = before the LLM.
    seed
        Seed of the choice.
    """

    keep: Budget
    layer: int
    seed: int
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)

    def stages(self, geometry: Geometry) -> list[Stage]:
        check_count("keep", self.keep, geometry.image_tokens)
        check_layer("layer", self.layer, geometry.depth, first=-1)
        return [BeforeLayer(max(self.layer, 0), self.select)]

    def select(self, view: LayerView) -> Keep:
        keys = sample_keys(view.prompt.input_ids, view.prompt.valid)
        noise = hashed_noise(keys, view.visual.shape[1], self.seed)
        return keep_top(noise, self.keep, view.visual_valid, view.visual_counts)
