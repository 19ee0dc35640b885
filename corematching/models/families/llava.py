"""LLaVA-1.5: every image is one square grid of patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corematching.models.families.base import Family
from corematching.models.families.tokens import ImageTokens, Tile


class Llava(Family):
    """LLaVA-1.5 (CLIP tower, two-layer projector, Llama)."""

    def grid(self, config: Any) -> tuple[int, int]:
        side = config.vision_config.image_size // config.vision_config.patch_size
        return side, side

    def image_tokens(self, config: Any) -> int:
        rows, columns = self.grid(config)
        return rows * columns

    def image(self, config: Any) -> ImageTokens:
        rows, columns = self.grid(config)
        return ImageTokens((Tile(rows, columns),), (1, rows, columns))

    def images(self, config: Any, inputs: Mapping[str, Any]) -> list[ImageTokens]:
        placeholders = int((inputs["input_ids"] == self.image_token_id(config)).sum())
        return [self.image(config)] * (placeholders // self.image_tokens(config))
