"""What a family's vision tower and projector cost and weigh: arithmetic on its configuration, without torch.

One class per kind of tower; :func:`tower_of` picks it by the configuration's model type. FLOPs are 2 per multiply-add
over matrix products, convolutions and attention; norms, rotary embeddings and interpolations are left out. Patches are
given per image as (crops or frames, rows, columns).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Patches = Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class Tower:
    """A tower of whole-image attention with a two-layer projector: CLIP and SigLIP under LLaVA's projector.

    Attributes
    ----------
    config
        The model's configuration, as a plain mapping.
    """

    config: Mapping[str, Any]

    # ---------------------------------------------------------------------------------------------------------- sizes
    @property
    def vision(self) -> Mapping[str, Any]:
        """The tower's part of the configuration."""
        return self.config["vision_config"]

    @property
    def width(self) -> int:
        """Width of its tokens."""
        return int(self.vision["hidden_size"])

    @property
    def ffn(self) -> int:
        """Width of its MLPs."""
        return int(self.vision["intermediate_size"])

    @property
    def layers(self) -> int:
        """Its depth."""
        return int(self.vision["num_hidden_layers"])

    @property
    def text_width(self) -> int:
        """Width of the tokens it gives."""
        return int(self.config["text_config"]["hidden_size"])

    @property
    def extra(self) -> int:
        """Tokens of a crop that show no patch ([CLS])."""
        return int(self.config.get("vision_feature_select_strategy", "full") == "default")

    @property
    def pixels(self) -> int:
        """Numbers that a patch is made of."""
        side = self.vision["patch_size"]
        return int(self.vision.get("num_channels", 3)) * (side if isinstance(side, int) else side[0]) ** 2

    # ---------------------------------------------------------------------------------------------------------- FLOPs
    def flops(self, patches: Patches) -> float:
        """Of the tower, patch embedding included."""
        tokens = sum(crops * (rows * columns + self.extra) for crops, rows, columns in patches)
        embedded = sum(crops * rows * columns for crops, rows, columns in patches)
        embedding = 2.0 * embedded * self.width * self.pixels
        pairs = sum(sum(length**2 for length in self.attended(patches, layer)) for layer in range(self.layers))
        return embedding + self.layers * self._dense(tokens) + 4.0 * self.width * pairs

    def _dense(self, tokens: int) -> float:
        """Of a layer's projections and MLP."""
        return 2.0 * tokens * self._layer_weights

    @property
    def _layer_weights(self) -> int:
        return 4 * self.width**2 + 2 * self.width * self.ffn

    def attended(self, patches: Patches, layer: int) -> Iterator[int]:
        """Lengths of the stretches within which a layer's tokens attend to each other."""
        for crops, rows, columns in patches:
            yield from [rows * columns + self.extra] * crops

    def projector_flops(self, patches: Patches) -> float:
        """Of what makes tokens of the decoder's width."""
        return 2.0 * sum(self.projected(patches)) * self.projector_weights

    def projected(self, patches: Patches) -> list[int]:
        """Tokens that go through the projector, per image."""
        return [crops * rows * columns for crops, rows, columns in patches]

    # -------------------------------------------------------------------------------------------------------- weights
    @property
    def weights(self) -> float:
        """Of the tower, but for norms and biases."""
        places = self.vision.get("num_position_embeddings") or self._places
        return self.pixels * self.width + places * self.width + self.layers * self._layer_weights

    @property
    def _places(self) -> int:
        size, side = self.vision["image_size"], self.vision["patch_size"]
        edge = (size if isinstance(size, int) else size[0]) // (side if isinstance(side, int) else side[0])
        return edge**2 + self.extra

    @property
    def projector_weights(self) -> float:
        """Of one pass of a token through the projector."""
        return self.width * self.text_width + self.text_width**2


class InternTower(Tower):
    """InternViT with a pixel shuffle: the projector reads ``1 / downsample_ratio`` squared patches as one token."""

    @property
    def _merged(self) -> int:
        return int(1 / self.config["downsample_ratio"]) ** 2

    def projected(self, patches: Patches) -> list[int]:
        return [number // self._merged for number in super().projected(patches)]

    @property
    def projector_weights(self) -> float:
        return self._merged * self.width * self.text_width + self.text_width**2


class QwenTower(Tower):
    """Qwen3-VL's tower: frames attend within themselves, mergers read 2 x 2 patches as one token."""

    @property
    def layers(self) -> int:
        return int(self.vision["depth"])

    @property
    def extra(self) -> int:
        return 0

    @property
    def pixels(self) -> int:
        frames, channels = self.vision["temporal_patch_size"], self.vision.get("in_channels", 3)
        return int(channels * frames * self.vision["patch_size"] ** 2)

    @property
    def _merged(self) -> int:
        return int(self.vision["spatial_merge_size"]) ** 2

    def projected(self, patches: Patches) -> list[int]:
        return [number // self._merged for number in super().projected(patches)]

    @property
    def projector_weights(self) -> float:
        """Of all mergers: the one at the end, and those that feed the decoder's first layers."""
        own = self._merged * self.width
        return (1 + len(self.vision.get("deepstack_visual_indexes", ()))) * (own**2 + own * self.text_width)


class WindowTower(QwenTower):
    """Qwen2.5-VL's tower: gated MLPs, and attention within windows but for a few layers."""

    @property
    def _layer_weights(self) -> int:
        return 4 * self.width**2 + 3 * self.width * self.ffn

    @property
    def _places(self) -> int:
        return 0  # rotary embeddings alone

    def attended(self, patches: Patches, layer: int) -> Iterator[int]:
        if layer in self.vision["fullatt_block_indexes"]:
            yield from super().attended(patches, layer)
            return
        side = self.vision["window_size"] // self.vision["patch_size"]
        for frames, rows, columns in patches:
            for height in _cut(rows, side):
                yield from [height * width for width in _cut(columns, side)] * frames


def _cut(length: int, side: int) -> list[int]:
    """Sides of the windows along one edge."""
    return [side] * (length // side) + ([length % side] if length % side else [])


_TOWERS: dict[str, type[Tower]] = {
    "qwen2_5_vl": WindowTower,
    "qwen3_vl": QwenTower,
    "internvl": InternTower,
}


def tower_of(config: Mapping[str, Any]) -> Tower:
    """The tower of a model's configuration (a plain mapping, such as a transformers config's ``to_dict()``)."""
    return _TOWERS.get(str(config.get("model_type")), Tower)(config)
