"""The token half of CoreMatching: visual tokens that activate the sentence's core neurons stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from corematching.methods.base import BeforeLayer, Geometry, Keep, Method, Stage
from corematching.methods.core import VOTERS, coactivation_counts, core_neurons, match_counts, voting
from corematching.methods.parameters import Budget, check_budget, check_choice, check_count, check_reference, place
from corematching.methods.selection import elbow_keep, keep_top
from corematching.methods.views import LayerView

SCORES = ("core", "last", "cosine", "attention")
THRESHOLDS = ("elbow", "elbow_release", "keep")


@dataclass(frozen=True)
class CoreTokens(Method):
    """Core tokens (CoreMatching, arXiv 2505.19235).

    At the FFN of layer ``layer - 1``: score every visual token by how many of the sentence's core neurons it activates
    and keep those at or above the elbow of the sorted scores, so that one token stays at least. The others leave at the
    input of ``layer``. All tokens that entered the layer, text and visual, vote for the sentence's core neurons (see
    ``core_neurons`` for what that means where most of an image is background; ``voters`` chooses others). Position ids
    stay the original ones.

    Differences from the published code: tokens really leave (the release zeroes KV rows instead, see
    ``corematching_release``); the score is the paper's (the release counts neurons activated together with the token
    five before the end: ``score="last"`` with ``reference=-5``); and so is the threshold (the release keeps tokens
    strictly above the elbow, which drops every visual token of a flat curve: ``threshold="elbow_release"``, which here
    falls back to the tokens at the elbow then).

    Parameters
    ----------
    layer
        Tokens leave at the input of this decoder layer.
    rho, beta
        Share of a token's positive activations that makes its core neurons; share of the FFN width that makes the
        sentence's.
    score
        "core": matches with the sentence's core neurons. "last": neurons activated together with the reference
        token. "cosine": cosine of activations with the reference token's. "attention": attention of the reference
        token, mean over heads.
    threshold
        "elbow": adaptive, the count follows from the curve, unless ``keep`` is given. "elbow_release": likewise,
        without the tokens at the elbow. "keep": the top ``keep`` tokens.
    keep
        Forced budget (count or fraction), for matched comparisons; None leaves the count to the elbow.
    reference
        Prompt position of the reference token, counted from the end (-1 = last).
    depth_fraction
        Gives ``layer`` as a fraction of the model's depth instead.
    voters
        Who votes for the sentence's core neurons: "all" tokens (the paper), the "text" tokens, or the "last" one.
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
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        check_budget("rho", self.rho, fraction_only=True)
        check_budget("beta", self.beta, fraction_only=True)
        check_choice("score", self.score, SCORES)
        check_choice("threshold", self.threshold, THRESHOLDS)
        check_choice("voters", self.voters, VOTERS)
        check_reference(self.reference)
        if self.threshold == "keep" or self.keep is not None:
            check_budget("keep", self.keep)

    def stages(self, geometry: Geometry) -> list[Stage]:
        if self.keep is not None:
            check_count("keep", self.keep, geometry.image_tokens)
        layer = place(self.layer, self.depth_fraction, geometry.depth, first=1)
        return [BeforeLayer(layer, self.select, activations=self.score != "attention")]

    def select(self, view: LayerView) -> Keep:
        scores = self.scores(view)
        if self.keep is not None:
            return keep_top(scores, self.keep, view.visual_valid, view.visual_counts)
        kept = elbow_keep(scores, view.visual_valid)
        if self.threshold == "elbow_release":
            above = elbow_keep(scores, view.visual_valid, strict=True)
            kept = torch.where(above.any(1, keepdim=True), above, kept)
        return Keep(kept)

    def scores(self, view: LayerView) -> Tensor:
        """[B, V], higher = keep."""
        if self.score == "attention":
            rows = torch.full_like(view.visual[:, :1], view.hidden.shape[1] + self.reference)
            return view.gather(view.attention(view.layer - 1, rows).mean(1)[:, 0])
        activations = view.activations()
        visual = view.gather(activations)
        view.spend([2 * count * visual.shape[2] for count in view.visual_counts])
        reference = activations[:, self.reference]
        if self.score == "last":
            return coactivation_counts(visual, reference)
        if self.score == "cosine":
            return cosine_similarity(visual.float(), reference[:, None].float(), dim=-1)
        count = max(1, int(activations.shape[2] * self.beta + 1e-9))
        core = core_neurons(activations, voting(view.valid, view.visual_mask, self.voters), self.rho, count)
        return match_counts(visual, core)
