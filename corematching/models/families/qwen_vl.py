"""Qwen2.5-VL and Qwen3-VL: every image a grid of its own, 2 x 2 patches to a token, three rows of position ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from corematching.models.families.base import Family
from corematching.models.families.tokens import ImageTokens, Tile


class QwenVL(Family):
    """Qwen2.5-VL and Qwen3-VL."""

    def tower(self, model: Any) -> nn.Module:
        return model.model.visual

    def projector(self, model: Any) -> nn.Module:
        return model.model.visual.merger

    def vision_depth(self, config: Any) -> int:
        return config.vision_config.depth

    def has_cls(self, config: Any) -> bool:
        return False

    def images(self, config: Any, inputs: Mapping[str, Any]) -> list[ImageTokens]:
        grids, merge = inputs.get("image_grid_thw"), config.vision_config.spatial_merge_size
        if grids is None:
            return []
        return [
            ImageTokens((Tile(rows // merge, columns // merge),) * frames, (frames, rows, columns))
            for frames, rows, columns in grids.tolist()
        ]
