"""Where each model family keeps its vision tower, projector, decoder layers and FFNs, and what its visual tokens are.

Adding a family means adding one :class:`Family` here; methods and the engine do not change.
"""

from __future__ import annotations

from typing import Any

from corematching.errors import UserError
from corematching.models.families.anyres import LlavaNext, LlavaOnevision
from corematching.models.families.base import Family, head_width, side_of
from corematching.models.families.internvl import InternVL
from corematching.models.families.llava import Llava
from corematching.models.families.qwen_vl import QwenVL
from corematching.models.families.tokens import (
    FRAME,
    KINDS,
    NEWLINE,
    PATCH,
    THUMBNAIL,
    ImageTokens,
    Tile,
    VisualTokens,
)

__all__ = [
    "FAMILIES",
    "FRAME",
    "KINDS",
    "NEWLINE",
    "PATCH",
    "THUMBNAIL",
    "Family",
    "ImageTokens",
    "Tile",
    "VisualTokens",
    "family_of",
    "head_width",
    "side_of",
]
_QWEN_INPUTS = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Llava("llava"),
        LlavaNext("llava_next", ("pixel_values", "image_sizes"), newlines=True),
        LlavaOnevision("llava_onevision", ("pixel_values", "image_sizes", "batch_num_images"), newlines=True),
        QwenVL("qwen2_5_vl", _QWEN_INPUTS, position_rows=3),
        QwenVL("qwen3_vl", _QWEN_INPUTS, position_rows=3),
        InternVL("internvl"),
    )
}


def family_of(config: Any) -> Family:
    """The family of a transformers config.

    Raises
    ------
    UserError
        If the family is not supported; names the supported ones.
    """
    model_type = getattr(config, "model_type", type(config).__name__)
    if model_type not in FAMILIES:
        raise UserError(f"model type {model_type!r} is not supported: valid are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
