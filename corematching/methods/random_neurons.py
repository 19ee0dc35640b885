"""Random control for neuron methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from corematching.methods.base import ChooseNeurons, Geometry, Method, Neurons, Stage
from corematching.methods.core_neurons import layer_range
from corematching.methods.parameters import check_budget
from corematching.methods.selection import hashed_noise, sample_keys
from corematching.methods.views import FFNView

LAYER_STRIDE = 1_000_003
"""Keeps the noise of one layer apart from that of another seed's."""


@dataclass(frozen=True)
class RandomNeurons(Method):
    """Compute random FFN neurons in decode: the control every neuron selection has to beat.

    Chosen where ``core_neurons`` chooses: once per prompt and layer, before the first decode step; prefill stays dense.
    The subset depends on the seed, the layer and the prompt's text, not on the sample's place in a batch.

    Parameters
    ----------
    keep
        Kept fraction of the FFN width.
    seed
        Seed of the choice.
    layers
        [first, last] decoder layers, inclusive; None = all.
    """

    keep: float
    seed: int
    layers: tuple[int, int] | None
    acts_on: ClassVar[frozenset[str]] = frozenset({"neurons"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep, fraction_only=True)

    def stages(self, geometry: Geometry) -> list[Stage]:
        return [ChooseNeurons(layer, self.select) for layer in layer_range(self.layers, geometry.depth)]

    def select(self, view: FFNView) -> Neurons:
        width = view.activations.shape[2]
        count = max(1, int(width * self.keep + 1e-9))
        keys = sample_keys(view.prompt.input_ids, view.prompt.valid)
        noise = hashed_noise(keys, width, self.seed + LAYER_STRIDE * view.layer)
        return Neurons(noise.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values)
