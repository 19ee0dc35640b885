"""What the engine must know of a model family: where its parts are, and what its visual tokens are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from corematching.errors import UserError
from corematching.methods.base import Geometry
from corematching.models.families.tokens import ImageTokens, VisualTokens


@dataclass(frozen=True)
class Family:
    """A model family of transformers; the defaults are LLaVA's layout.

    Attributes
    ----------
    model_type
        As in the transformers config.
    visual_inputs
        What its processor says of images besides ``input_ids`` and ``attention_mask``.
    position_rows
        Rows of position ids that the rotary embedding reads: 1, or 3 (time, height, width) under mrope.
    newlines
        Whether some visual tokens are newlines, which end a row or a tile.
    """

    model_type: str
    visual_inputs: tuple[str, ...] = ("pixel_values",)
    position_rows: int = 1
    newlines: bool = False

    # ------------------------------------------------------------------------------------------------- where parts are
    def base(self, model: Any) -> nn.Module:
        """The multi-modal model without its language-model head (its forward takes input ids and pixels)."""
        return model.model

    def decoder(self, model: Any) -> nn.Module:
        """The text decoder: ``layers``, ``norm``, ``rotary_emb``; each layer has ``self_attn`` and ``mlp``."""
        return model.model.language_model

    def tower(self, model: Any) -> nn.Module:
        """The vision tower."""
        tower = model.model.vision_tower
        return getattr(tower, "vision_model", tower)

    def projector(self, model: Any) -> nn.Module:
        """What makes tokens of the decoder's width out of the tower's features."""
        return model.model.multi_modal_projector

    def head(self, model: Any) -> nn.Module:
        return model.lm_head

    def tower_attention(self, model: Any, layer: int) -> nn.Module:
        """The attention of a layer of the vision tower."""
        tower: Any = self.tower(model)
        return tower.encoder.layers[layer].self_attn

    # ------------------------------------------------------------------------------------------------- what sizes are
    def image_token_id(self, config: Any) -> int:
        return config.image_token_id

    def vision_depth(self, config: Any) -> int:
        """Layers of the vision tower."""
        return config.vision_config.num_hidden_layers

    def added_levels(self, config: Any) -> int:
        """How many decoder layers' outputs get visual features of earlier tower layers added (deepstack)."""
        return 0

    def tower_sequences(self, config: Any, patches: tuple[int, int, int]) -> list[list[int]]:
        """Per layer of the vision tower: lengths of the sequences that its attention runs over for one image.

        Parameters
        ----------
        patches
            (crops or frames, rows, columns), see :class:`ImageTokens`.
        """
        crops, rows, columns = patches
        return [[rows * columns + int(self.has_cls(config))] * crops] * self.vision_depth(config)

    def has_cls(self, config: Any) -> bool:
        """Whether the tower has a [CLS] token, which the features skip."""
        return getattr(config, "vision_feature_select_strategy", "full") == "default"

    def grid(self, config: Any) -> tuple[int, int]:
        """Visual tokens of one image, (rows, columns), where all images have the same.

        Raises
        ------
        UserError
            If every image has a grid of its own: see :meth:`visual_tokens`.
        """
        raise UserError(f"images of {self.model_type} models have grids of their own: one grid does not describe them")

    def geometry(self, config: Any) -> Geometry:
        """The sizes that methods check their parameters against."""
        return Geometry(
            depth=config.text_config.num_hidden_layers,
            ffn_width=config.text_config.intermediate_size,
            heads=config.text_config.num_attention_heads,
            image_tokens=self.image_tokens(config),
            vision_depth=self.vision_depth(config),
            vision_feature_layer=getattr(config, "vision_feature_layer", -1),
        )

    def image_tokens(self, config: Any) -> int | None:
        """Visual tokens of one image; None where that depends on the image."""
        return None

    def sees_whole_images(self, config: Any, layer: int) -> bool:
        """Whether patches of a crop or frame all attend to each other in a layer of the vision tower."""
        return True

    # --------------------------------------------------------------------------------------- what a prompt's images are
    def image(self, config: Any) -> ImageTokens:
        """Any image, where all have the same visual tokens."""
        raise NotImplementedError

    def images(self, config: Any, inputs: Mapping[str, Any]) -> list[ImageTokens]:
        """The images of a batch of prompts, in the order of their placeholders.

        Parameters
        ----------
        inputs
            What the family's processor returns: ``input_ids`` [B, n] and what ``visual_inputs`` names.
        """
        raise NotImplementedError

    def of_tokens(self, model: Any, scores: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Scores of the patches, [H, patches] in the tower's order, as scores of the visual tokens, [H, tokens].

        Made as the tokens are made of the patches; newlines, which no patch stands behind, come out as NaN.

        Parameters
        ----------
        inputs
            As in :meth:`images`.
        """
        raise NotImplementedError

    def visual_tokens(self, config: Any, inputs: Mapping[str, Any]) -> VisualTokens:
        """The visual tokens of a batch of prompts, in the order of their placeholders (row by row).

        Raises
        ------
        UserError
            If the images do not account for the placeholders.
        """
        tokens = VisualTokens.of(self.images(config, inputs))
        placeholders = int((inputs["input_ids"] == self.image_token_id(config)).sum())
        if len(tokens) != placeholders:
            raise UserError(
                f"the images give {len(tokens)} visual tokens, the prompts have {placeholders} image tokens: "
                "make both with the model's processor"
            )
        return tokens


def head_width(text: Any) -> int:
    """Width of an attention head of a decoder, from its transformers config; some families state it apart."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def side_of(size: Any) -> int:
    """The side of a square, which transformers' configurations give once or twice."""
    return size if isinstance(size, int) else size[0]


def runs(mask: Tensor) -> list[int]:
    """Lengths of the runs of True in a bool [B, n], row by row."""
    lengths: list[int] = []
    for row in mask.int().tolist():
        length = 0
        for here in [*row, 0]:
            if length and not here:
                lengths.append(length)
            length = length + 1 if here else 0
    return lengths
