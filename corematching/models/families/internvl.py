"""InternVL: square crops and a thumbnail, each pixel-shuffled to a quarter of its patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from corematching.models.families.base import Family, runs, side_of
from corematching.models.families.tokens import PATCH, THUMBNAIL, ImageTokens, Tile


class InternVL(Family):
    """InternVL2.5 and InternVL3 in transformers' form (InternViT with [CLS], Qwen2 or InternLM2)."""

    def tower_attention(self, model: Any, layer: int) -> nn.Module:
        return model.model.vision_tower.encoder.layer[layer].attention

    def of_tokens(self, model: Any, scores: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        vision, ratio = model.config.vision_config, int(1 / model.config.downsample_ratio)
        side = side_of(vision.image_size) // side_of(vision.patch_size) // ratio
        return scores.unflatten(1, (-1, side, ratio, side, ratio)).mean((3, 5)).flatten(1)

    def images(self, config: Any, inputs: Mapping[str, Any]) -> list[ImageTokens]:
        """One image per run of placeholders: text stands around every image. How crops lie in it is not told."""
        patches = side_of(config.vision_config.image_size) // side_of(config.vision_config.patch_size)
        side = int(patches * config.downsample_ratio)
        found = runs(inputs["input_ids"] == self.image_token_id(config))
        return [self._image(length // side**2, side, patches) for length in found]

    def _image(self, tiles: int, side: int, patches: int) -> ImageTokens:
        if tiles == 1:
            return ImageTokens((Tile(side, side),), (1, patches, patches))
        crops = (Tile(side, side, PATCH, box=None),) * (tiles - 1)
        return ImageTokens((*crops, Tile(side, side, THUMBNAIL)), (tiles, patches, patches))
