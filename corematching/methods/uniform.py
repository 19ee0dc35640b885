"""Uniform-stride control."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from corematching.methods.base import Keep
from corematching.methods.control import Control
from corematching.methods.parameters import count_of
from corematching.methods.views import LayerView


@dataclass(frozen=True)
class Uniform(Control):
    """Keep visual tokens at a uniform stride over the raster: the control that knows only geometry.

    Token ``floor((i + 1/2) * N / keep)`` is kept for i = 0..keep-1. Kept tokens keep their original position ids.

    Parameters
    ----------
    keep
        Visual tokens to keep per sample (count or fraction).
    layer
        They leave at the input of this decoder layer; -1 = before the LLM.
    seed
        Rotates the start of the stride, in tokens.
    """

    def select(self, view: LayerView) -> Keep:
        mask = torch.zeros_like(view.visual_valid)
        wanted = [count_of(self.keep, count) for count in view.visual_counts]
        for row, (count, kept) in enumerate(zip(view.visual_counts, wanted, strict=True)):
            index = (torch.arange(kept, device=mask.device) * 2 + 1) * count // (2 * max(kept, 1)) + self.seed
            mask[row, index % max(count, 1)] = True
        return Keep(mask, wanted)
