"""Qwen2.5-VL and Qwen3-VL: every image a grid of its own, 2 x 2 patches to a token, three rows of position ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from corematching.models.families.base import Family
from corematching.models.families.tokens import ImageTokens, Tile


class QwenVL(Family):
    """Qwen2.5-VL and Qwen3-VL."""

    def tower(self, model: Any) -> nn.Module:
        return model.model.visual

    def projector(self, model: Any) -> nn.Module:
        return model.model.visual.merger

    def tower_attention(self, model: Any, layer: int) -> nn.Module:
        return model.model.visual.blocks[layer].attn

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

    def sees_whole_images(self, config: Any, layer: int) -> bool:
        full = getattr(config.vision_config, "fullatt_block_indexes", None)
        return full is None or layer in full

    def of_tokens(self, model: Any, scores: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        vision = model.config.vision_config
        tokens = scores.unflatten(1, (-1, vision.spatial_merge_size**2)).mean(2)
        if not hasattr(vision, "window_size"):
            return tokens
        # Inside this tower, tokens stand window by window.
        order, _ = get_vision_window_index(
            inputs["image_grid_thw"], vision.spatial_merge_size, vision.window_size, vision.patch_size
        )
        return tokens[:, order.argsort().to(tokens.device)]

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
