"""VTC-CLS: keep the patches that [CLS] looks at over many layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from corematching.methods.base import Geometry, Keep, Method, Stage, VisionOutput
from corematching.methods.parameters import Budget, check_budget, check_count, place
from corematching.methods.selection import keep_top_patches
from corematching.methods.views import VisionView


@dataclass(frozen=True)
class VTCCLS(Method):
    """VTC-CLS (arXiv 2412.05819; repository THU-MIG/VTC-CLS).

    Patches are ranked by the attention that [CLS] pays them, mean over heads, summed over the tower layers ``layer`` to
    the second to last; the top ``keep`` go on in raster order with consecutive position ids. Nothing is dropped inside
    the LLM, as in the official code.

    Differences from the official code: works for batches; ``keep=1`` works.

    Parameters
    ----------
    layer
        First tower layer of the sum (official default 16 of 24; the last layer never takes part).
    keep
        Visual tokens to keep per image (count, or truncated fraction); met exactly.
    depth_fraction
        Gives ``layer`` as a fraction of the tower's depth instead.
    """

    layer: int
    keep: Budget
    depth_fraction: float | None
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)

    def stages(self, geometry: Geometry) -> list[Stage]:
        check_count("keep", self.keep, geometry.image_tokens)
        last = geometry.vision_depth - 1
        layers = range(place(self.layer, self.depth_fraction, last), last)

        def select(view: VisionView) -> Keep:
            scores = torch.stack([view.cls_attention(layer).mean(1) for layer in layers]).sum(0)
            return keep_top_patches(scores, self.keep)

        return [VisionOutput(select, renumber=True, layers=tuple(layers), inside=False)]
