"""Pictures as a model's processor makes them, one by one, and put together for a batch of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from corematching.answering.recipes import recipe_of
from corematching.errors import UserError
from corematching.models.families import family_of

_KINDS = "mm_token_type_ids"
"""An input that describes prompts rather than pictures: which tokens are visual."""


@dataclass(frozen=True)
class Encoded:
    """One picture.

    Attributes
    ----------
    inputs
        The model's inputs for it, first dimension: what this picture adds to a batch.
    text
        What stands for it in a prompt.
    """

    inputs: dict[str, Tensor]
    text: str


class Encoder:
    """Makes a family's model inputs of pictures and texts.

    Parameters
    ----------
    config
        Transformers config of the model.
    processor
        Of the model.
    """

    def __init__(self, config: Any, processor: Any) -> None:
        self.config, self.processor = config, processor
        self.recipe, self.family = recipe_of(config), family_of(config)

    def tokens(self, sizes: Sequence[tuple[int, int]]) -> int:
        """About how many visual tokens pictures of sizes (width, height) have, without looking at them."""
        if not sizes:
            return 0
        turned = [(height, width) for width, height in sizes]
        told = {name: value for name, value in self.recipe.processor.items() if name != "size"}
        return sum(self.processor._get_num_multimodal_tokens(image_sizes=turned, **told)["num_image_tokens"])

    def picture(self, picture: Image.Image) -> Encoded:
        """A picture, seen as if it were alone in its prompt (as lmms-eval's wrappers hand several over, too).

        Raises
        ------
        UserError
            If the processor cannot make anything of it.
        """
        token = self.processor.image_token
        try:
            given = self.processor(text=token, images=[picture], return_tensors="pt", **self.recipe.processor)
        except (ValueError, RuntimeError, ZeroDivisionError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"the processor refuses an image of {picture.width} x {picture.height} pixels: {reason}"
            ) from error
        inputs = {name: given[name] for name in self.family.visual_inputs if name != _KINDS}
        return Encoded(inputs, self._stands(given["input_ids"][0].tolist()))

    def _stands(self, ids: list[int]) -> str:
        """The text that tokenizes to what a prompt of one picture alone was expanded to."""
        tokenizer = self.processor.tokenizer
        bare = tokenizer(self.processor.image_token).input_ids
        place = bare.index(tokenizer.convert_tokens_to_ids(self.processor.image_token))
        return "".join(tokenizer.convert_ids_to_tokens(ids[place : len(ids) - (len(bare) - place - 1)]))

    def joined(self, pictures: Sequence[Encoded], input_ids: Tensor) -> dict[str, Tensor]:
        """The visual inputs of a batch.

        Parameters
        ----------
        pictures
            In the order of their places in the prompts; empty if there are none.
        input_ids
            Long [B, n], the prompts.
        """
        inputs: dict[str, Tensor] = {}
        if pictures:
            inputs = {name: _stacked([one.inputs[name] for one in pictures]) for name in pictures[0].inputs}
        if _KINDS in self.family.visual_inputs:
            inputs[_KINDS] = (input_ids == self.family.image_token_id(self.config)).long()
        return inputs


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Parts one behind the other; where they are lists of crops, all padded to the longest."""
    if parts[0].dim() < 5:
        return torch.cat(list(parts))
    most = max(part.shape[1] for part in parts)
    return torch.cat([torch.cat([one, one.new_zeros(1, most - one.shape[1], *one.shape[2:])], 1) for one in parts])
