"""PruMerge: keep the patches that stand out for [CLS], and add to each what resembles it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from corematching.methods.base import Geometry, Method, Replace, Stage, VisionOutput
from corematching.methods.parameters import check_budget
from corematching.methods.views import VisionView

NEIGHBOURS = 32
"""Most similar tokens that are added to each kept one: a constant of the official code."""


@dataclass(frozen=True)
class PruMerge(Method):
    """LLaVA-PruMerge (arXiv 2403.15388; repository 42Shawn/LLaVA-PruMerge).

    Scores: the [CLS] row of one softmax over the tower's last layer, queries and keys at full width (heads not split).
    Patches whose score is an outlier (above Q3 + 1.5 IQR) are kept; each becomes its feature plus the score-weighted
    sum of the features of its 32 most similar other patches (cosine of keys); one extra token is the score-weighted sum
    of all pruned patches. Weights are not normalised. The LLM gets the kept patches by decreasing score, then the extra
    token, with consecutive position ids.

    The number of tokens adapts to the image (official default): outliers + 1. ``keep_ratio`` fixes it to
    ``int(keep_ratio * patches) + 1``. ``keep_ratio=1`` is the dense model, without the extra token. The trace lists
    kept patches by index and the extra token as -1.

    Differences from the official code: every image of a batch has its own count (officially they share one); the paper
    speaks of weighted averages, the official code sums, and so does this.

    Parameters
    ----------
    keep_ratio
        Fraction of patches to keep, or None to adapt.
    """

    keep_ratio: float | None
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        if self.keep_ratio is not None:
            check_budget("keep_ratio", self.keep_ratio, fraction_only=True)

    def stages(self, geometry: Geometry) -> list[Stage]:
        if self.keep_ratio == 1.0:
            return []
        return [VisionOutput(self.select, renumber=True)]

    def select(self, view: VisionView) -> Replace:
        def choose(scores: Tensor, outliers: int) -> Tensor:
            count = outliers if self.keep_ratio is None else int(self.keep_ratio * len(scores))
            return scores.topk(count).indices

        return prune_and_merge(view, choose)


def prune_and_merge(view: VisionView, choose: Callable[[Tensor, int], Tensor]) -> Replace:
    """Run PruMerge with a rule that picks the patches to keep.

    Parameters
    ----------
    choose
        From one image's scores [P] and the number of outliers among them to kept patches (long [S], in output order,
        possibly with repetitions).
    """
    scores = cls_scores(view.cls_query(-1), view.keys(-1))
    keys = view.keys(-1).flatten(2)[:, 1:]
    outliers = count_outliers(scores)
    rows, spent = [], []
    # Counts adapt to the image, so images go one by one.
    for features, score, key, count in zip(view.features, scores, keys, outliers, strict=True):
        selected = choose(score, count)
        spent.append(2 * len(selected) * (key.numel() + NEIGHBOURS * features.shape[1]))
        rows.append((merge_centres(features, score, key, selected), F.pad(selected, (0, 1), value=-1)))
    view.spend(spent)
    counts = [len(origin) for _, origin in rows]
    hidden = torch.nn.utils.rnn.pad_sequence([tokens for tokens, _ in rows], batch_first=True)
    origin = torch.nn.utils.rnn.pad_sequence([origin for _, origin in rows], batch_first=True, padding_value=-1)
    return Replace(hidden, origin, slot=torch.zeros_like(origin), counts=counts)


def cls_scores(query: Tensor, keys: Tensor) -> Tensor:
    """[CLS] attention to the patches with heads not split: [N, H, hd] and [N, P + 1, H, hd] -> [N, P]."""
    query, keys = query.flatten(1), keys.flatten(2)
    logits = (keys @ query[..., None])[..., 0].float() * query.shape[-1] ** -0.5
    return logits.softmax(-1)[:, 1:]


def count_outliers(scores: Tensor) -> list[int]:
    """How many of each image's scores [N, P] lie above Q3 + 1.5 IQR (linear percentiles). Synchronises once."""
    lower, upper = scores.double().quantile(torch.tensor([0.25, 0.75], dtype=torch.double, device=scores.device), dim=1)
    limit = upper + 1.5 * (upper - lower)
    return (scores > limit[:, None]).sum(1).tolist()


def merge_centres(features: Tensor, scores: Tensor, keys: Tensor, selected: Tensor) -> Tensor:
    """The kept tokens with their neighbours added, and the extra token.

    Parameters
    ----------
    features, scores, keys
        One image: [P, d_v], [P], [P, C].
    selected
        Long [S] patches to keep. A repeated one is its own copy's neighbour, and each repetition takes the smallest
        pruned index out of the game, as in the official code.

    Returns
    -------
    [S + 1, d_v].
    """
    pruned = torch.ones_like(scores, dtype=torch.bool).scatter(0, selected, False)
    # Ascending pruned indices are the last ones; repetitions of kept ones push the smallest of them out.
    pruned = pruned.to(torch.int8).argsort(stable=True)[len(selected) :]
    entries = torch.cat([selected, pruned])
    unit = F.normalize(keys.float(), dim=-1)
    similarity = unit[selected] @ unit[entries].T
    similarity.fill_diagonal_(-torch.inf)
    near = entries[similarity.topk(min(NEIGHBOURS, len(entries) - 1), dim=1).indices]
    weighted = features.float() * scores[:, None]
    added = torch.cat([weighted[near].sum(1), weighted[pruned].sum(0, keepdim=True)])
    added[:-1] += features[selected]
    return added.to(features.dtype)
