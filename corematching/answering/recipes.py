"""How each model family is put a question: as lmms-eval's own wrapper of that family does it.

What the wrapper does besides the checkpoint's chat template and processor is written here, once per family; the bundled
suite's predictions are held to the wrappers' own in ``tests/test_families_wrappers.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from corematching.errors import UserError

_MOST_PIXELS, _LEAST_PIXELS = 16384, 4
"""Bounds of ``qwen-vl-utils`` on an image, in tokens."""
_MOST_RATIO = 200
"""Longer images than that are refused by Qwen-VL's processors."""


@dataclass(frozen=True)
class Recipe:
    """How a family is asked.

    Attributes
    ----------
    wrapper
        The model of lmms-eval that this follows.
    prompts, images
        The prompt and image modes that fit the family (see `corematching.answering.conversation`), the usual one first.
    system
        Text of a system turn that the wrapper puts in front.
    multiple
        Pixels that both sides of an image are brought to a multiple of, before the processor; 0: nothing is done.
    processor
        What the processor is told besides.
    """

    wrapper: str
    prompts: tuple[str, ...] = ("lmms_eval",)
    images: tuple[str, ...] = ("processor",)
    system: str | None = None
    multiple: int = 0
    processor: Mapping[str, Any] = field(default_factory=dict)

    def choose(self, family: str, prompt: str | None, image: str | None) -> tuple[str, str]:
        """The prompt and image mode to use; None means the usual one.

        Raises
        ------
        UserError
            For a mode that does not fit the family.
        """
        chosen = []
        for name, value, valid in (("prompt", prompt, self.prompts), ("image", image, self.images)):
            if value is not None and value not in valid:
                raise UserError(f"{name}={value} does not fit {family} models: they take {name}={' or '.join(valid)}")
            chosen.append(valid[0] if value is None else value)
        return chosen[0], chosen[1]

    def sized(self, image: Image.Image) -> Image.Image:
        """An image as the processor gets it.

        Raises
        ------
        UserError
            If the family cannot take an image of this shape.
        """
        if not self.multiple:
            return image
        width, height = image.size
        if max(width, height) > _MOST_RATIO * min(width, height):
            raise UserError(
                f"an image of {width} x {height} pixels is too long for this model: one side may have at most "
                f"{_MOST_RATIO} times the pixels of the other"
            )
        return image.resize(multiple_size(width, height, self.multiple))


def multiple_size(width: int, height: int, multiple: int) -> tuple[int, int]:
    """(width, height) near an image's own, multiples of `multiple`, within the bounds of ``qwen-vl-utils``."""
    sides = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
    pixels = sides[0] * sides[1]
    if pixels > (most := _MOST_PIXELS * multiple**2):
        shrink = math.sqrt(width * height / most)
        sides = [math.floor(side / shrink / multiple) * multiple for side in (width, height)]
    elif pixels < (least := _LEAST_PIXELS * multiple**2):
        grow = math.sqrt(least / (width * height))
        sides = [math.ceil(side * grow / multiple) * multiple for side in (width, height)]
    return sides[0], sides[1]


RECIPES: dict[str, Recipe] = {
    "llava": Recipe("llava_hf", ("llava15", "lmms_eval"), ("pad", "processor")),
    "llava_next": Recipe("llava_hf"),
    "llava_onevision": Recipe("llava_hf"),
    "qwen2_5_vl": Recipe(
        "qwen2_5_vl",
        multiple=28,
        processor={"size": {"shortest_edge": 256 * 28 * 28, "longest_edge": 2048 * 28 * 28}},
    ),
    "qwen3_vl": Recipe("qwen3_vl", system="You are a helpful assistant.", multiple=32, processor={"do_resize": False}),
    "internvl": Recipe("internvl_hf", processor={"min_patches": 1, "max_patches": 12}),
}
"""By the model type of the transformers config."""


def recipe_of(config: Any) -> Recipe:
    """The recipe of a (supported) model's transformers config."""
    return RECIPES[config.model_type]
