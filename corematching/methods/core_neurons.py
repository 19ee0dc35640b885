"""The neuron half of CoreMatching: decode computes core neurons only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from corematching.errors import UserError
from corematching.methods.base import ChooseNeurons, Geometry, Method, Neurons, Stage
from corematching.methods.core import core_neurons
from corematching.methods.parameters import check_budget
from corematching.methods.views import FFNView


def layer_range(layers: tuple[int, int] | None, depth: int) -> range:
    """Layers first..last (inclusive) of a ``layers=[first, last]`` parameter; None means all.

    Raises
    ------
    UserError
        If the range does not lie within the model.
    """
    if layers is None:
        return range(depth)
    if len(layers) != 2 or not 0 <= layers[0] <= layers[1] < depth:
        raise UserError(
            f"layers={list(layers)} is not valid: give [first, last] within 0 to {depth - 1}, or null for all"
        )
    return range(layers[0], layers[1] + 1)


def choose_core_neurons(view: FFNView, rho: float, keep: float) -> Neurons:
    """Sentence-wise core neurons of the tokens that entered this layer."""
    count = max(1, int(view.activations.shape[2] * keep + 1e-9))
    return Neurons(core_neurons(view.activations, view.valid, rho, count))


@dataclass(frozen=True)
class CoreNeurons(Method):
    """Sentence-wise core neurons (CoreMatching, arXiv 2505.19235; first defined by CoreInfer, arXiv 2410.18311).

    In prefill every token that enters a layer votes for its own core neurons (the top ``rho`` of its positive FFN
    activations); the ``keep`` share of the FFN width with most votes is computed in decode, the rest is not.
    Prefill itself stays dense.

    The published CoreMatching code leaves neurons alone; this follows the paper.

    Parameters
    ----------
    keep
        Kept fraction of the FFN width (beta of the paper).
    rho
        Share of a token's positive activations that makes its core neurons.
    layers
        [first, last] decoder layers, inclusive; None = all.
    """

    keep: float
    rho: float
    layers: tuple[int, int] | None
    acts_on: ClassVar[frozenset[str]] = frozenset({"neurons"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep, fraction_only=True)
        check_budget("rho", self.rho, fraction_only=True)

    def stages(self, geometry: Geometry) -> list[Stage]:
        return [ChooseNeurons(layer, self.select) for layer in layer_range(self.layers, geometry.depth)]

    def select(self, view: FFNView) -> Neurons:
        return choose_core_neurons(view, self.rho, self.keep)
