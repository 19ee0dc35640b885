"""What a model's sizes say of cost before it is loaded: arithmetic on its configuration, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from corematching.cost.towers import Tower, tower_of


def decoder_layer_flops(
    hidden: int, q_width: int, kv_width: int, queries: float, keys: float, ffn_width: float
) -> float:
    """One decoder layer, 2 per multiply-add: ``queries`` tokens attend to ``keys`` rows, then a gated FFN."""
    projections = 2 * queries * hidden * (2 * q_width + 2 * kv_width)
    return projections + 4 * queries * keys * q_width + 6 * queries * hidden * ffn_width


def vision_layer_flops(width: int, ffn_width: int, entering: float, staying: float, per_image: float) -> float:
    """One layer of the vision tower: tokens entering attention, tokens staying for the MLP, tokens of one image."""
    return 8.0 * entering * width**2 + 4.0 * entering * per_image * width + 4.0 * staying * width * ffn_width


@dataclass(frozen=True)
class Shapes:
    """A vision-language model's sizes.

    Attributes
    ----------
    config
        Its transformers configuration, as a plain mapping.
    image
        Patches of the image that is asked about, (crops or frames, rows, columns); None: one square crop.
    """

    config: Mapping[str, Any]
    image: tuple[int, int, int] | None = None

    @property
    def text(self) -> Mapping[str, Any]:
        """The decoder's part of the configuration."""
        return self.config["text_config"]

    @property
    def tower(self) -> Tower:
        """The vision tower with its projector."""
        return tower_of(self.config)

    @property
    def depth(self) -> int:
        return int(self.text["num_hidden_layers"])

    @property
    def _widths(self) -> tuple[int, int]:
        heads = self.text["num_attention_heads"]
        one = self.text.get("head_dim") or self.text["hidden_size"] // heads
        return heads * one, (self.text.get("num_key_value_heads") or heads) * one

    @property
    def decoder_weights(self) -> float:
        """Weights that one decode step reads: decoder layers and output head."""
        (q, kv), d = self._widths, self.text["hidden_size"]
        return self.depth * (2 * d * (q + kv) + 3 * d * self.text["intermediate_size"]) + d * self.text["vocab_size"]

    @property
    def weights(self) -> float:
        """All weights; norms and biases, a few parts in ten thousand, are left out."""
        embedding = 0 if self.config.get("tie_word_embeddings") else self.text["hidden_size"] * self.text["vocab_size"]
        return self.decoder_weights + embedding + self.tower.weights + self.tower.projector_weights

    @property
    def kv_row(self) -> float:
        """Numbers that one token leaves in one layer's KV cache."""
        return 2 * self._widths[1]

    def prefill_flops(self, tokens_by_layer: list[float]) -> float:
        """Vision tower, projector and decoder over a prompt with one image and so many tokens entering each layer."""
        d, tower = self.text["hidden_size"], self.tower
        layers = sum(
            decoder_layer_flops(d, *self._widths, tokens, tokens, self.text["intermediate_size"])
            for tokens in tokens_by_layer
        )
        if self.image is None:
            side = tower.vision["image_size"] // tower.vision["patch_size"]
            image = [(1, side, side)]
        else:
            image = [self.image]
        return tower.flops(image) + tower.projector_flops(image) + layers

    def step_flops(self, kept_by_layer: list[float]) -> float:
        """One decode step over so many KV rows per layer, output head included."""
        d = self.text["hidden_size"]
        layers = sum(
            decoder_layer_flops(d, *self._widths, 1, rows, self.text["intermediate_size"]) for rows in kept_by_layer
        )
        return layers + 2.0 * d * self.text["vocab_size"]
