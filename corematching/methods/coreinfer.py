"""CoreInfer: the prompt's most often activated neurons are the only ones that decode computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corematching.methods.base import ChooseNeurons, Geometry, Method, Neurons, Stage
from corematching.methods.core_neurons import layer_range
from corematching.methods.parameters import check_budget, check_choice
from corematching.methods.views import FFNView

TIES = ("argsort", "first")


@dataclass(frozen=True)
class CoreInfer(Method):
    """CoreInfer, stability-guided (arXiv 2410.18311; repository wangqinsi1/CoreInfer).

    In prefill, every token counts its largest activations (signed, not by magnitude): as many as ``token_keep`` times
    the average number of positive activations per token, the same for all tokens. The ``keep`` share of the FFN width
    with the highest counts is computed in decode; prefill stays dense.

    **Fewer neurons may stay**: a neuron that no token counted is never kept, as in the official code.

    Counts are small integers, and the budget usually cuts through neurons with equal ones. Which of them stay is up to
    ``torch.argsort`` over the counted neurons, as in the official code: that order is not stable and depends on the
    machine. ``ties="first"`` prefers the lower index, the same everywhere.

    Difference from ``core_neurons`` (CoreMatching's definition): there each token's share is of its *own* positive
    activations. Differences from the official code: any layers may be chosen (there the first must be 6, and the
    published scripts leave the last ones dense too: ``layers=[6, 26]`` of 32); ``keep=1.0`` keeps everything.

    Parameters
    ----------
    keep
        Kept fraction of the FFN width (the official ``sparsity``).
    token_keep
        Counted share of the average number of positive activations (the official ``token_sparsity``).
    layers
        [first, last] decoder layers, inclusive; None = all.
    ties
        "argsort" or "first".
    """

    keep: float
    token_keep: float
    layers: tuple[int, int] | None
    ties: str
    acts_on: ClassVar[frozenset[str]] = frozenset({"neurons"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep, fraction_only=True)
        check_budget("token_keep", self.token_keep, fraction_only=True)
        check_choice("ties", self.ties, TIES)

    def stages(self, geometry: Geometry) -> list[Stage]:
        return [ChooseNeurons(layer, self.select) for layer in layer_range(self.layers, geometry.depth)]

    def select(self, view: FFNView) -> Neurons | None:
        if self.keep == 1:
            return None
        width = view.activations.shape[2]
        counts = token_counts(view.activations, view.valid, self.token_keep)
        return most_counted(counts, max(1, int(width * self.keep)), self.ties)


def token_counts(activations: Tensor, valid: Tensor, token_keep: float) -> Tensor:
    """In how many tokens each neuron is among the largest activations: [B, n, I], bool [B, n] -> long [B, I].

    How many count per token is the integer part of ``token_keep`` times the mean number of positive activations.
    """
    width = activations.shape[2]
    positive = ((activations > 0) & valid[..., None]).sum((1, 2))
    limit = (token_keep * positive.double() / valid.sum(1)).floor().long()[:, None, None]
    # A token has at most I positive activations, so this is the largest limit there can be.
    largest = activations.topk(max(1, int(width * token_keep)), dim=2)
    rank = torch.arange(largest.indices.shape[2], device=activations.device)
    counted = (rank < limit) & valid[..., None]
    counts = torch.zeros(activations.shape[0], width, dtype=torch.long, device=activations.device)
    return counts.scatter_add(1, largest.indices.flatten(1), counted.flatten(1).long())


def most_counted(counts: Tensor, most: int, ties: str = "argsort") -> Neurons:
    """The ``most`` neurons with the highest counts (long [B, I]), without those that nothing counted."""
    chosen = []
    for own in counts:
        counted = own.nonzero()[:, 0]
        order = own[counted].argsort(descending=True, stable=ties == "first")[:most]
        chosen.append(counted[order].sort().values)
    width = max(1, *map(len, chosen))
    # Rows with fewer repeat their first neuron; one that counted nothing has to name some.
    rows = [torch.cat([(own if len(own) else own.new_zeros(1))[:1].expand(width - len(own)), own]) for own in chosen]
    return Neurons(torch.stack(rows))
