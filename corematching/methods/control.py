"""What the controls share: they keep visual tokens at one layer without looking at what the model computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from corematching.methods.base import BeforeLayer, Geometry, Keep, Method, Replace, Stage
from corematching.methods.parameters import Budget, check_budget, check_count, check_layer
from corematching.methods.views import LayerView


@dataclass(frozen=True)
class Control(Method):
    """A control acts at the input of decoder layer ``layer`` (-1 = before the LLM); subclasses say what stays."""

    keep: Budget
    layer: int
    seed: int
    grids: ClassVar[bool] = False
    """Whether it needs visual tokens that are plain grids."""
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)

    def stages(self, geometry: Geometry) -> list[Stage]:
        check_count("keep", self.keep, geometry.image_tokens)
        check_layer("layer", self.layer, geometry.depth, first=-1)
        return [BeforeLayer(max(self.layer, 0), self.select, grids=self.grids)]

    def select(self, view: LayerView) -> Keep | Replace | None:
        """Decide which tokens go on."""
        raise NotImplementedError
