"""The neuron half of CoreMatching: decode computes core neurons only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from corematching.errors import UserError
from corematching.methods.base import ChooseNeurons, Geometry, Method, Neurons, Stage
from corematching.methods.core import VOTERS, core_neurons, voting
from corematching.methods.parameters import check_budget, check_choice
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


@dataclass(frozen=True)
class CoreNeurons(Method):
    """Sentence-wise core neurons (CoreMatching, arXiv 2505.19235; first defined by CoreInfer, arXiv 2410.18311).

    In prefill every token that enters a layer votes for its own core neurons (the top ``rho`` of its positive FFN
    activations); the ``keep`` share of the FFN width with most votes is computed in decode, the rest is not.
    Prefill itself stays dense.

    **Answers may not end.** Every token has one vote, and most tokens of a prompt are patches of the image, mostly
    background. The neurons that end an answer need not be among those these tokens vote for: on the bundled model half
    of MMBench's answers ran on to the cap with ``keep=0.4``, and none with 0.8, with neurons chosen by weight size
    (``wanda_neurons``), or with core tokens alone. ``voters`` asks the text tokens or the last token only.

    **Ties.** Of neurons with equally many votes those of lower index stay; activations equal to a token's smallest core
    activation are core as well. The published CoreMatching code leaves neurons alone, so that this follows the paper;
    CoreInfer's code, which shares the definition, sorts votes by an unstable ``torch.argsort``: ``coreinfer`` can.

    Parameters
    ----------
    keep
        Kept fraction of the FFN width (beta of the paper).
    rho
        Share of a token's positive activations that makes its core neurons.
    layers
        [first, last] decoder layers, inclusive; None = all.
    voters
        "all" tokens that entered the layer (the paper), the "text" tokens among them, or the "last" token.
    """

    keep: float
    rho: float
    layers: tuple[int, int] | None
    voters: str
    acts_on: ClassVar[frozenset[str]] = frozenset({"neurons"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep, fraction_only=True)
        check_budget("rho", self.rho, fraction_only=True)
        check_choice("voters", self.voters, VOTERS)

    def stages(self, geometry: Geometry) -> list[Stage]:
        return [ChooseNeurons(layer, self.select) for layer in layer_range(self.layers, geometry.depth)]

    def select(self, view: FFNView) -> Neurons:
        count = max(1, int(view.activations.shape[2] * self.keep + 1e-9))
        votes = voting(view.valid, view.visual_mask, self.voters)
        return Neurons(core_neurons(view.activations, votes, self.rho, count))
