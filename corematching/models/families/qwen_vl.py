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

    def tower_sequences(self, config: Any, patches: tuple[int, int, int]) -> list[list[int]]:
        vision, (frames, rows, columns) = config.vision_config, patches
        whole = [rows * columns] * frames
        full = getattr(vision, "fullatt_block_indexes", None)
        if full is None:
            return [whole] * vision.depth
        side = vision.window_size // vision.patch_size
        windows = [height * width for height in _cuts(rows, side) for width in _cuts(columns, side)] * frames
        return [whole if layer in full else windows for layer in range(vision.depth)]

    def added_levels(self, config: Any) -> int:
        return len(getattr(config.vision_config, "deepstack_visual_indexes", ()))

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


def _cuts(length: int, side: int) -> list[int]:
    """A length in pieces of ``side``, the last one shorter."""
    return [min(side, length - start) for start in range(0, length, side)]
