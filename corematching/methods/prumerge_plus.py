"""PruMerge+: PruMerge with evenly spread patches added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corematching.errors import UserError
from corematching.methods.base import Geometry, Method, Replace, Stage, VisionOutput
from corematching.methods.parameters import check_budget
from corematching.methods.prumerge import prune_and_merge
from corematching.methods.views import VisionView


@dataclass(frozen=True)
class PruMergePlus(Method):
    """LLaVA-PruMerge+ (arXiv 2403.15388; repository 42Shawn/LLaVA-PruMerge, whose tower calls this variant).

    As :class:`~corematching.methods.prumerge.PruMerge`, with patches at a uniform stride added to the outliers before
    merging. Adaptive: with ``step = int(patches / outliers)``, every ``int(step / 3)``-th index not kept already is
    appended in ascending order (the last patch never). The tokens are outliers + added + 1.

    ``keep_ratio`` takes the official training path: the top ``int(keep_ratio * patches)`` scores plus every
    ``int(1 / keep_ratio)``-th index from half a step on; indices in both are kept twice, as officially, so the tokens
    are about ``2 * keep_ratio * patches + 1``. ``keep_ratio=1`` is the dense model.

    Differences from the official code: works for batches, every image with its own count; an image without outliers
    (officially a division by zero) keeps its highest score as the one outlier; the training path also accepts ratios
    for which the two halves differ in length.

    Parameters
    ----------
    keep_ratio
        Fraction of patches to keep by score, in (0, 0.5] or 1, or None to adapt.
    """

    keep_ratio: float | None
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        if self.keep_ratio is None:
            return
        check_budget("keep_ratio", self.keep_ratio, fraction_only=True)
        if 0.5 < self.keep_ratio < 1:
            raise UserError(
                f"keep_ratio={self.keep_ratio} is not valid: prumerge_plus keeps twice as many; "
                "give a fraction in (0, 0.5] or 1"
            )

    def stages(self, geometry: Geometry) -> list[Stage]:
        if self.keep_ratio == 1.0:
            return []
        return [VisionOutput(self.select, renumber=True)]

    def select(self, view: VisionView) -> Replace:
        return prune_and_merge(view, self.choose)

    def choose(self, scores: Tensor, outliers: int) -> Tensor:
        """Patches to keep of one image with scores [P], in output order."""
        patches = len(scores)
        if self.keep_ratio is not None:
            step = int(1 / self.keep_ratio)
            top = scores.topk(int(self.keep_ratio * patches)).indices
            return torch.cat([top, torch.arange(step // 2, patches - 1, step, device=scores.device)])
        top = scores.topk(max(outliers, 1)).indices
        ratio = len(top) / patches
        spread = torch.arange(0, patches - 1, int(int(1 / ratio) / 3), device=scores.device)
        return torch.cat([top, spread[~torch.isin(spread, top)]])
