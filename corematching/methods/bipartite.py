"""Bipartite soft matching, the merging step of ToMe, as pure tensor functions.

Shapes: N sequences of T tokens, C channels of the metric, d channels of the tokens, r merged pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from corematching.methods.base import Merge


@dataclass(frozen=True)
class Matching:
    """Which tokens merge into which. Set A holds the even positions, set B the odd ones."""

    stay: Tensor
    """Long [N, |A| - r]: A tokens that stay, in output order."""
    go: Tensor
    """Long [N, r]: A tokens that merge, best match first."""
    into: Tensor
    """Long [N, r]: the B token each of them merges into."""

    def merge(self, hidden: Tensor, sizes: Tensor, origin: Tensor) -> Merge:
        """Merge by the size-weighted mean; the output is the staying A tokens, then all B tokens.

        Parameters
        ----------
        hidden
            [N, T, d].
        sizes
            [N, T, 1] patches each token stands for, in float32 so that sums stay exact whatever the model's dtype.
        origin
            Long [N, T] representative of each token; a merged token is represented by its B token's.
        """
        total = self._merged_sum(sizes)
        mean = (self._merged_sum(hidden * sizes) / total).to(hidden.dtype)
        return Merge(mean, total, torch.cat([origin[:, ::2].gather(1, self.stay), origin[:, 1::2]], 1))

    def _merged_sum(self, values: Tensor) -> Tensor:
        """[N, T, d] -> [N, T - r, d], merged tokens added to their partner."""
        source, target = values[:, ::2], values[:, 1::2]
        target = target.scatter_add(1, _wide(self.into, values), source.gather(1, _wide(self.go, values)))
        return torch.cat([source.gather(1, _wide(self.stay, values)), target], 1)


def bipartite_match(metric: Tensor, r: int, *, class_token: bool) -> Matching | None:
    """Match every A token with its most cosine-similar B token and merge the ``r`` best pairs.

    Parameters
    ----------
    metric
        [N, T, C], not normalised.
    r
        Pairs to merge; capped at half of the tokens (without a class token: of the unprotected ones).
    class_token
        The first token never merges. The staying A tokens then come out in ascending position; without it they come
        out in order of decreasing similarity, as in the official code.

    Returns
    -------
    None if there is nothing to merge.
    """
    r = min(r, (metric.shape[1] - int(class_token)) // 2)
    if r <= 0:
        return None
    unit = F.normalize(metric.float(), dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    if class_token:
        scores[:, 0] = -torch.inf
    best, partner = scores.max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    go, stay = order[:, :r], order[:, r:]
    if class_token:
        stay = stay.sort(dim=1).values
    return Matching(stay, go, partner.gather(1, go))


def matching_flops(tokens: int, channels: int) -> float:
    """FLOPs of the similarity matrix between both halves."""
    return 2.0 * ((tokens + 1) // 2) * (tokens // 2) * channels


def _wide(index: Tensor, values: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, values.shape[-1])
