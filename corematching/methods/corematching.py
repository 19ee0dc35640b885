"""CoreMatching: the token half and the neuron half together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from corematching.errors import UserError
from corematching.methods.base import Geometry, Method, Stage
from corematching.methods.core_neurons import CoreNeurons
from corematching.methods.core_tokens import CoreTokens
from corematching.methods.parameters import Budget, check_budget


@dataclass(frozen=True)
class CoreMatching(Method):
    """CoreMatching (ICML 2025, arXiv 2505.19235): core tokens in prefill, core neurons in decode, co-adaptive.

    Only core tokens enter the layers after ``layer``, so the neurons of those layers are found from core tokens (and
    text) alone. See :class:`CoreTokens` and :class:`CoreNeurons` for what each half does, how it differs from the
    published code, and why an answer may not end: its last neurons need not be among those the prompt votes for.

    Parameters
    ----------
    layer, rho, beta, score, threshold, keep, reference, depth_fraction, voters
        As in :class:`CoreTokens`; ``beta`` is also the kept fraction of the FFN width in decode, and ``voters`` those
        of both halves.
    layers
        [first, last] decoder layers whose neurons are pruned; None = all.
    tokens, neurons
        Switch a half off for ablations.
    """

    layer: int
    rho: float
    beta: float
    score: str
    threshold: str
    keep: Budget | None
    reference: int
    depth_fraction: float | None
    voters: str
    layers: tuple[int, int] | None
    tokens: bool
    neurons: bool
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens", "neurons"})

    def __post_init__(self) -> None:
        if not (self.tokens or self.neurons):
            raise UserError("tokens=False and neurons=False leave nothing to do: use method=dense")
        check_budget("beta", self.beta, fraction_only=True)
        self.token_half()

    def token_half(self) -> CoreTokens:
        return CoreTokens(
            self.layer,
            self.rho,
            self.beta,
            self.score,
            self.threshold,
            self.keep,
            self.reference,
            self.depth_fraction,
            self.voters,
        )

    def neuron_half(self) -> CoreNeurons:
        return CoreNeurons(self.beta, self.rho, self.layers, self.voters)

    def stages(self, geometry: Geometry) -> list[Stage]:
        token_stages = self.token_half().stages(geometry) if self.tokens else []
        neuron_stages = self.neuron_half().stages(geometry) if self.neurons else []
        return [*token_stages, *neuron_stages]
