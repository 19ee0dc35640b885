"""Static neuron control: weight magnitude, with or without activation norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from corematching.methods.base import ChooseNeurons, Geometry, Method, Neurons, Stage
from corematching.methods.core_neurons import layer_range
from corematching.methods.parameters import check_budget, check_choice
from corematching.methods.views import FFNView

SCORES = ("wanda", "magnitude")


@dataclass(frozen=True)
class WandaNeurons(Method):
    """Keep neurons by the size of what they add to the residual stream: the control every neuron selection has to beat.

    Wanda (arXiv 2306.11695; repository locuslab/wanda) scores a single weight by its magnitude times the norm of its
    input over calibration tokens. Here the score of a whole neuron is that of its down-projection column: the column's
    norm times the norm of the neuron's activations over the prompt's tokens. It ignores *which* tokens activate it and
    keeps one fixed set for the whole answer. Score "magnitude" leaves the activations out: the same neurons for every
    prompt.

    Differences from the paper: whole neurons instead of single weights, decode only, and the prompt itself is the
    calibration set.

    Parameters
    ----------
    keep
        Kept fraction of the FFN width.
    score
        "wanda" or "magnitude".
    layers
        [first, last] decoder layers, inclusive; None = all.
    """

    keep: float
    score: str
    layers: tuple[int, int] | None
    acts_on: ClassVar[frozenset[str]] = frozenset({"neurons"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep, fraction_only=True)
        check_choice("score", self.score, SCORES)

    def stages(self, geometry: Geometry) -> list[Stage]:
        return [ChooseNeurons(layer, self.select) for layer in layer_range(self.layers, geometry.depth)]

    def select(self, view: FFNView) -> Neurons:
        batch, _, width = view.activations.shape
        count = max(1, int(width * self.keep + 1e-9))
        order = self.scores(view).expand(batch, -1).argsort(dim=1, descending=True, stable=True)
        return Neurons(order[:, :count].sort(dim=1).values)

    def scores(self, view: FFNView) -> Tensor:
        """[B, I] or [1, I], higher = keep."""
        columns = view.down_weight.float().norm(dim=0)[None]
        if self.score == "magnitude":
            return columns
        activations = view.activations.float().masked_fill(~view.valid[..., None], 0)
        return columns * activations.norm(dim=1)
