"""Where each model family keeps its vision tower, projector, decoder layers and FFNs.

Adding a family means adding one :class:`Family` here; methods and the engine do not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from corematching.errors import UserError
from corematching.methods.base import Geometry


@dataclass(frozen=True)
class Family:
    """LLaVA-1.5's layout in transformers: ``model.model.{vision_tower, multi_modal_projector, language_model}``."""

    model_type: str

    def base(self, model: Any) -> nn.Module:
        """The multi-modal model without its language-model head (its forward takes input ids and pixels)."""
        return model.model

    def decoder(self, model: Any) -> nn.Module:
        """The text decoder: ``layers``, ``norm``, ``rotary_emb``; each layer has ``self_attn`` and ``mlp``."""
        return model.model.language_model

    def tower(self, model: Any) -> nn.Module:
        """The vision tower: ``embeddings``, ``pre_layrnorm``, ``encoder.layers``."""
        tower = model.model.vision_tower
        return getattr(tower, "vision_model", tower)

    def projector(self, model: Any) -> nn.Module:
        return model.model.multi_modal_projector

    def head(self, model: Any) -> nn.Module:
        return model.lm_head

    def image_token_id(self, config: Any) -> int:
        return config.image_token_id

    def grid(self, config: Any) -> tuple[int, int]:
        """Patches of one image, (rows, columns)."""
        side = config.vision_config.image_size // config.vision_config.patch_size
        return side, side

    def has_cls(self, config: Any) -> bool:
        """Whether the features skip a [CLS] token at position 0 (``vision_feature_select_strategy="default"``)."""
        return config.vision_feature_select_strategy == "default"

    def geometry(self, config: Any) -> Geometry:
        rows, columns = self.grid(config)
        return Geometry(
            depth=config.text_config.num_hidden_layers,
            ffn_width=config.text_config.intermediate_size,
            heads=config.text_config.num_attention_heads,
            image_tokens=rows * columns,
            vision_depth=config.vision_config.num_hidden_layers,
            vision_feature_layer=config.vision_feature_layer,
        )


FAMILIES = {family.model_type: family for family in (Family("llava"),)}


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
