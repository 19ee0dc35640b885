"""FasterVLM: keep the patches that [CLS] looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from corematching.methods.base import Geometry, Keep, Method, Stage, VisionOutput
from corematching.methods.parameters import Budget, check_budget, check_count
from corematching.methods.selection import keep_top_patches
from corematching.methods.views import VisionView


@dataclass(frozen=True)
class FasterVLM(Method):
    """FasterVLM (arXiv 2412.01818; repository Theia-4869/FasterVLM).

    Patches are ranked by the attention that [CLS] pays them in the tower layer whose output becomes the features, mean
    over heads; the top ``keep`` go on in raster order, [CLS] does not. The remaining tokens get consecutive position
    ids, as in the official code, where the sequence simply is shorter.

    Differences from the official code: the selection stands before the projector instead of after it, which is the same
    because the projector works per token.

    Parameters
    ----------
    keep
        Visual tokens to keep per image (count, or truncated fraction); met exactly.
    """

    keep: Budget
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)

    def stages(self, geometry: Geometry) -> list[Stage]:
        check_count("keep", self.keep, geometry.image_tokens)
        layer = geometry.vision_score_layer

        def select(view: VisionView) -> Keep:
            return keep_top_patches(self.scores(view, layer), self.keep)

        return [VisionOutput(select, renumber=True, layers=(layer,), inside=False)]

    @staticmethod
    def scores(view: VisionView, layer: int) -> Tensor:
        """[N, P] attention of [CLS], mean over heads."""
        return view.cls_attention(layer).mean(1)
