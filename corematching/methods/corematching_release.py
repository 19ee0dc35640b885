"""What the published CoreMatching code does, for parity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from corematching.methods.base import AfterPrefill, Geometry, Method, Stage, ZeroKV
from corematching.methods.core import coactivation_counts
from corematching.methods.parameters import check_layer, check_reference
from corematching.methods.selection import elbow_keep
from corematching.methods.views import KVView


@dataclass(frozen=True)
class CoreMatchingRelease(Method):
    """The published code's behaviour. It saves nothing: KV rows of pruned tokens are zeroed, not dropped.

    After the prefill of each layer ``first_layer``..``last_layer``, visual tokens are scored by the number of neurons
    they activate together with the prompt token at ``reference``; those not above the elbow (strictly, where the paper
    keeps tokens at it as well: see ``core_tokens``) get zero keys and values in that layer's cache (a zero key still
    takes softmax mass). On a flat curve that is every visual token. Prefill logits equal the dense model's; neurons are
    never pruned. The official image slice 5:581 is generalised to the true visual span.

    Parameters
    ----------
    first_layer, last_layer
        Decoder layers acted on, inclusive.
    reference
        Prompt position of the reference token, counted from the end.
    """

    first_layer: int
    last_layer: int
    reference: int
    acts_on: ClassVar[frozenset[str]] = frozenset({"kv"})

    def __post_init__(self) -> None:
        check_reference(self.reference)

    def stages(self, geometry: Geometry) -> list[Stage]:
        check_layer("first_layer", self.first_layer, geometry.depth)
        check_layer("last_layer", self.last_layer, geometry.depth, first=self.first_layer)
        layers = range(self.first_layer, self.last_layer + 1)
        return [AfterPrefill(layer, self.select, activations=True) for layer in layers]

    def select(self, view: KVView) -> ZeroKV:
        activations = view.activations()
        counts = coactivation_counts(activations, activations[:, self.reference])
        view.spend([2 * length * activations.shape[2] for length in view.lengths])
        return ZeroKV(view.visual_mask & ~elbow_keep(counts, view.visual_mask, strict=True))
