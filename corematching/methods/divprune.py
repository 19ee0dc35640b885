"""DivPrune: keep the most diverse visual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from corematching.methods.base import Geometry, Keep, Method, Stage, VisionOutput
from corematching.methods.parameters import Budget, check_budget, check_count
from corematching.methods.views import VisionView


@dataclass(frozen=True)
class DivPrune(Method):
    """DivPrune (CVPR 2025, arXiv 2503.02175; repository vbdi/divprune).

    Solves the max-min diversity problem greedily on the projected tokens: the first pick is the token farthest from its
    nearest neighbour, every further one the token farthest from all picks so far (distance = 1 - cosine). Kept tokens
    go on in raster order with consecutive position ids, as in the official code. No text, no attention.

    Differences from the official code: each image of a batch gets its own selection (the official code applies that of
    the first sample to all); the image's place comes from the input ids (officially a fixed 35-token prefix); a token
    already picked is never picked again, which only matters if the remaining ones are duplicates of picks; distances
    are computed in float32 whatever the model's dtype.

    Parameters
    ----------
    keep
        Visual tokens to keep per image; a fraction is rounded as the official code does (half to even). Met exactly.
    """

    keep: Budget
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)

    def stages(self, geometry: Geometry) -> list[Stage]:
        check_count("keep", self.keep, geometry.image_tokens)
        return [VisionOutput(self.select, renumber=True, inside=False)]

    def select(self, view: VisionView) -> Keep | None:
        images, patches = view.features.shape[:2]
        keep = self.keep if isinstance(self.keep, int) else max(1, round(self.keep * patches))
        if keep >= patches:
            return None
        picks = most_diverse(view.projected, keep)
        view.spend(2 * patches**2 * view.projected.shape[2])
        return Keep(torch.zeros_like(view.features[..., 0], dtype=torch.bool).scatter(1, picks, True), [keep] * images)


def most_diverse(tokens: Tensor, keep: int) -> Tensor:
    """Greedy max-min selection by cosine distance.

    Parameters
    ----------
    tokens
        [N, P, d], P >= 2.
    keep
        Tokens to pick, 1 to P. One pick depends on all before, so the loop runs over picks (all images at once).

    Returns
    -------
    Long [N, keep] in the order of picking; the first index wins ties.
    """
    unit = F.normalize(tokens.float(), dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)
    # The smallest entry of a column is the token's distance to itself.
    nearest = distance.topk(2, dim=1, largest=False).values[:, 1]
    picks = [nearest.argmax(1, keepdim=True)]
    closest = torch.full_like(nearest, torch.inf)
    while len(picks) < keep:
        row = distance.gather(1, picks[-1][..., None].expand(-1, -1, distance.shape[2]))[:, 0]
        closest = torch.minimum(closest, row).scatter(1, picks[-1], -torch.inf)
        picks.append(closest.argmax(1, keepdim=True))
    return torch.cat(picks, 1)
