"""TopV: visual tokens stay by what optimal transport says they contribute to a layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from corematching.errors import UserError
from corematching.methods.base import BeforeLayer, Geometry, Keep, Method, Stage
from corematching.methods.parameters import Budget, check_budget, check_choice, check_count, check_layer, count_of
from corematching.methods.selection import top_mask
from corematching.methods.views import LayerView

FEATURES = ("cosine", "euclidean")
IMPORTANCE = ("cost", "mass")
TERMS = ("normalised", "raw")


@dataclass(frozen=True)
class TopV(Method):
    """TopV (CVPR 2025, arXiv 2503.18278). The authors published no code: this follows the paper's description.

    Once, in prefill, at layer ``layer``: sources are the visual tokens that enter the layer, targets the same
    positions after its attention and post-attention norm. Moving source i to target j costs

        ``feature_weight`` * dissimilarity of their features
        + ``spatial_weight`` * distance of their grid positions (as a share of the image's diagonal)
        + ``central_weight`` * distance of the source from the image's centre (as a share of half the diagonal).

    Entropic optimal transport (Sinkhorn, uniform marginals) gives how much each source contributes to each target.
    Important tokens stay, and some of the others are recovered at a uniform stride over the raster, so that no region
    goes unseen. The rest leaves at the input of the next layer. No attention scores are used.

    What the paper leaves open, and what is chosen here:

    * *Aggregation.* With uniform marginals every source ships the same mass once Sinkhorn has converged, and a cost
      that depends on the source alone (the central distance) cannot change the plan at all. So importance is by
      default minus the transport cost of a source's mass under the plan (``importance="cost"``): tokens that
      contribute cheaply - alike, near, central - are important. ``importance="mass"`` sums the plan's rows instead,
      stopping after the target marginal was enforced, which tells sources apart only while iterations are few.
    * *Scale.* The costs of a source's mass differ in spread by orders of magnitude: over random tokens the feature
      part varies by some 0.01, the central distance by 0.2, so that the plain sum ranks by distance from the centre
      (Spearman correlation 0.73 to 0.99), whatever the features. The paper finds its results insensitive to the three
      weights, which such a sum cannot be. So each part is brought to the same spread over a sample's tokens before it
      is weighted (``terms="normalised"``), and with the default weights position together counts half as much as
      features: the correlation is 0.5 at most. ``terms="raw"`` is the plain sum.
    * *Dissimilarity.* One minus cosine, in [0, 2]; "euclidean" takes the distance of unit vectors, in [0, 2] as well.
    * *Recovery.* ``recover`` is a share of ``keep``, not of the pruned tokens, so that ``keep`` is met exactly.
    * *Several images.* Tokens of different images, and of different tiles of one, are as far apart as the corners of a
      tile; distances are shares of the tile's own diagonal.

    Parameters
    ----------
    layer
        The decoder layer that is looked at; layers 0..layer see all tokens.
    keep
        Visual tokens to keep per sample, recovered ones included (count or fraction).
    recover
        Share of ``keep`` that is recovered at a uniform stride, in [0, 1).
    feature_weight, spatial_weight, central_weight
        Weights of the three costs.
    epsilon
        Strength of the entropic regularisation, in units of cost.
    iterations
        Sinkhorn iterations.
    feature
        "cosine" or "euclidean".
    importance
        "cost" or "mass".
    terms
        "normalised" or "raw": how ``importance="cost"`` adds up the three costs.
    """

    layer: int
    keep: Budget
    recover: float
    feature_weight: float
    spatial_weight: float
    central_weight: float
    epsilon: float
    iterations: int
    feature: str
    importance: str
    terms: str
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)
        check_budget("iterations", self.iterations)
        check_choice("feature", self.feature, FEATURES)
        check_choice("importance", self.importance, IMPORTANCE)
        check_choice("terms", self.terms, TERMS)
        if not 0 <= self.recover < 1:
            raise UserError(f"recover={self.recover} is not valid: give a share in [0, 1)")
        if not self.epsilon > 0:
            raise UserError(f"epsilon={self.epsilon} is not valid: give a number > 0")
        for name in ("feature_weight", "spatial_weight", "central_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} is not valid: give a number >= 0")

    def stages(self, geometry: Geometry) -> list[Stage]:
        check_count("keep", self.keep, geometry.image_tokens)
        check_layer("layer", self.layer, geometry.depth - 1)
        return [BeforeLayer(self.layer + 1, self.select, attended=True)]

    def select(self, view: LayerView) -> Keep | None:
        wanted = [count_of(self.keep, count) if count else 0 for count in view.visual_counts]
        if all(keep >= count for keep, count in zip(wanted, view.visual_counts, strict=True)):
            return None
        recovered = [int(keep * self.recover) for keep in wanted]
        scores = self.scores(view)
        with view.charging([keep < count for keep, count in zip(wanted, view.visual_counts, strict=True)]):
            view.spend([2 * count**2 * view.hidden.shape[2] for count in view.visual_counts])
        valid = view.visual_valid
        best = top_mask(scores, valid, [keep - extra for keep, extra in zip(wanted, recovered, strict=True)])
        pruned = valid & ~best
        left = [count - keep + extra for count, keep, extra in zip(view.visual_counts, wanted, recovered, strict=True)]
        return Keep(best | every_nth(pruned, left, recovered), wanted)

    def scores(self, view: LayerView) -> Tensor:
        """[B, V], higher = keep."""
        dissimilar, spatial, central = self.costs(view)
        plan = sinkhorn(
            self.weighed(dissimilar, spatial, central[..., None]), view.visual_valid, self.epsilon, self.iterations
        )
        mass = plan.sum(2)
        if self.importance == "mass":
            return mass
        parts = [(plan * part).sum(2) / mass.clamp(min=1e-30) for part in (dissimilar, spatial)]
        parts.append(central)
        if self.terms == "normalised":
            parts = [same_spread(part, view.visual_valid) for part in parts]
        return -self.weighed(*parts)

    def weighed(self, dissimilar: Tensor, spatial: Tensor, central: Tensor) -> Tensor:
        """The weighted sum of the three costs."""
        return self.feature_weight * dissimilar + self.spatial_weight * spatial + self.central_weight * central

    def costs(self, view: LayerView) -> tuple[Tensor, Tensor, Tensor]:
        """Dissimilarity and spatial distance, [B, V, V] sources by targets, and central distance of sources [B, V]."""
        sources = normalize(view.gather(view.entered).float(), dim=2)
        targets = normalize(view.gather(view.attended()).float(), dim=2)
        cosine = sources @ targets.transpose(1, 2)
        dissimilar = 1 - cosine if self.feature == "cosine" else (2 - 2 * cosine).clamp(min=0).sqrt()
        owner = view.fact("image") * (1 + view.fact("tile").max()) + view.fact("tile")
        places, sizes = (
            torch.stack([view.fact(name) for name in names], 2)
            for names in (("row", "column"), ("tile_rows", "tile_columns"))
        )
        return dissimilar, *grid_distances(owner, places, sizes)


def same_spread(values: Tensor, valid: Tensor) -> Tensor:
    """Each row of [B, V] with mean 0 and standard deviation 1 over its valid entries; constant rows become 0."""
    count = valid.sum(1, keepdim=True).clamp(min=1)
    centred = (values - (values * valid).sum(1, keepdim=True) / count) * valid
    deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
    return centred / deviation.masked_fill(deviation < 1e-6, torch.inf)


def grid_distances(owner: Tensor, places: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Distances between tokens (share of the diagonal) and from the centre (share of half the diagonal).

    Parameters
    ----------
    owner
        Long [B, V]: which grid a token lies in (that of its image, or of its tile).
    places
        Long [B, V, 2]: row and column there; tokens behind the last column count as in it.
    sizes
        Long [B, V, 2]: rows and columns of the grid.

    Returns
    -------
    [B, V, V] and [B, V], both in [0, 1].
    """
    corner = (sizes - 1).float()
    place = torch.minimum(places.float(), corner)
    diagonal = corner.norm(dim=2).clamp(min=1)
    apart = torch.cdist(place, place) / diagonal[:, :, None]
    apart = torch.where(owner[:, :, None] == owner[:, None], apart, 1.0)
    return apart, (place - corner / 2).norm(dim=2) / (diagonal / 2)


def sinkhorn(cost: Tensor, valid: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Entropic optimal transport with uniform marginals, in the log domain.

    Parameters
    ----------
    cost
        [B, S, S].
    valid
        Bool [B, S]: slots that take part, the same on both sides.
    epsilon, iterations
        Regularisation; number of times both marginals are enforced (the target marginal last).

    Returns
    -------
    Transport plan [B, S, S]; its columns sum to 1 / valid slots, rows and columns of other slots are 0.
    """
    pairs = valid[:, :, None] & valid[:, None]
    kernel = (-cost / epsilon).masked_fill(~pairs, -torch.inf)
    marginal = -valid.sum(1, keepdim=True).float().log()
    rows = torch.zeros_like(cost[:, :, 0])
    columns = torch.zeros_like(rows)
    for _ in range(iterations):
        rows = (marginal - (kernel + columns[:, None]).logsumexp(2)).masked_fill(~valid, 0)
        columns = (marginal - (kernel + rows[:, :, None]).logsumexp(1)).masked_fill(~valid, 0)
    return (kernel + rows[:, :, None] + columns[:, None]).exp()


def every_nth(mask: Tensor, sizes: list[int], counts: list[int]) -> Tensor:
    """Bool [B, V]: ``counts[b]`` of the ``sizes[b]`` true entries, at a uniform stride."""
    size, count = (torch.tensor(numbers, device=mask.device)[:, None] for numbers in (sizes, counts))
    rank = mask.long().cumsum(1) - 1
    # Entry number r of m is chosen when the stride's count goes up there: exactly n of m, evenly spread.
    size = size.clamp(min=1)
    chosen = (rank + 1) * count // size > rank * count // size
    return mask & chosen
