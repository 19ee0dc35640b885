"""LLaVA-NeXT and LLaVA-OneVision: the whole image small, then crops of the enlarged one laid out as one map.

The map is cut to the image's own aspect ratio, and a newline token ends each of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from corematching.models.families.base import Family
from corematching.models.families.tokens import THUMBNAIL, ImageTokens, Tile


class LlavaNext(Family):
    """LLaVA-NeXT (CLIP tower with [CLS], Vicuna or Mistral)."""

    def crops(self, config: Any, size: tuple[int, int]) -> tuple[int, int]:
        """Crops, (rows, columns), of an image of a size (height, width)."""
        side = config.vision_config.image_size
        height, width = select_best_resolution(size, config.image_grid_pinpoints)
        return height // side, width // side

    def whole(self, inputs: Mapping[str, Any]) -> list[bool]:
        """Per image: whether it is seen small only."""
        return [False] * len(inputs["image_sizes"])

    def images(self, config: Any, inputs: Mapping[str, Any]) -> list[ImageTokens]:
        if inputs.get("image_sizes") is None:
            return []
        sizes = [(int(height), int(width)) for height, width in inputs["image_sizes"]]
        return [self.of_size(config, size, small) for size, small in zip(sizes, self.whole(inputs), strict=True)]

    def of_size(self, config: Any, size: tuple[int, int], small: bool) -> ImageTokens:
        """The tokens of an image of a size (height, width)."""
        side = config.vision_config.image_size // config.vision_config.patch_size
        if small:
            return ImageTokens((Tile(side, side, newline="tile"),), (1, side, side))
        across = self.crops(config, size)
        rows, columns = self.shown(config, *unpadded(size, (across[0] * side, across[1] * side)))
        tiles = (Tile(side, side, THUMBNAIL), Tile(rows, columns, newline="row"))
        return ImageTokens(tiles, (1 + across[0] * across[1], side, side))

    def of_tokens(self, model: Any, scores: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        config = model.config
        images = self.images(config, inputs)
        crops = [image.patches[0] for image in images]
        side = config.vision_config.image_size // config.vision_config.patch_size
        maps = scores.unflatten(1, (sum(crops), side**2)).permute(1, 2, 0).split(crops)
        newline = scores.new_full((len(scores),), math.nan)
        packed, _ = self.base(model).pack_image_features(  # type: ignore[operator]
            maps, inputs["image_sizes"], image_newline=newline, **self.packing(config)
        )
        return torch.cat(packed).T

    def packing(self, config: Any) -> dict[str, Any]:
        """What packing depends on besides the images' sizes."""
        return {"vision_feature_select_strategy": config.vision_feature_select_strategy}

    def shown(self, config: Any, rows: int, columns: int) -> tuple[int, int]:
        """Grid of the tokens that a map of so many patches becomes."""
        return rows, columns


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision (SigLIP tower without [CLS], Qwen2): large maps are resized, several images are seen small."""

    def whole(self, inputs: Mapping[str, Any]) -> list[bool]:
        together = inputs.get("batch_num_images")
        if together is None:
            return super().whole(inputs)
        return [int(number) > 1 for number in together for _ in range(int(number))]

    def packing(self, config: Any) -> dict[str, Any]:
        return {"vision_aspect_ratio": config.vision_aspect_ratio}

    def shown(self, config: Any, rows: int, columns: int) -> tuple[int, int]:
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        side = config.vision_config.image_size // config.vision_config.patch_size
        ratio = math.sqrt(rows * columns / (most * side**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


def unpadded(size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a map that show an image of a size (height, width), as transformers cuts its padding off."""
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        cut = (rows - int(round(height * (columns / width), 7))) // 2
        return rows - 2 * cut, columns
    cut = (columns - int(round(width * (rows / height), 7))) // 2
    return rows, columns - 2 * cut
