"""Prompts for timing: random text around random images, made without a processor.

What a question costs depends on lengths and on an image's size only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corematching.errors import UserError
from corematching.models.families import Family, family_of, side_of
from corematching.models.families.anyres import LlavaNext
from corematching.models.families.internvl import InternVL
from corematching.models.families.qwen_vl import QwenVL


def fixed_inputs(
    model: Any,
    before: int = 35,
    after: int = 40,
    images: int = 1,
    seed: int = 0,
    size: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """A prompt of random text around random images, one text token between two of them.

    Parameters
    ----------
    before, after
        Text tokens in front of and behind the visual tokens (LLaVA-1.5's conversation prefix has 35).
    size
        (height, width) of the images, in pixels as the processor would have resized them; None: two by two crops, or
        a square of 16 x 16 tokens. Families whose images are all alike have their own.

    Raises
    ------
    UserError
        If images of that size do not fit the model.
    """
    config, family = model.config, family_of(model.config)
    image_token = family.image_token_id(config)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = torch.tensor([i for i in range(3, min(config.text_config.vocab_size, 4096)) if i != image_token])
    text = vocabulary[torch.randint(len(vocabulary), (before + after + images - 1,), generator=generator)]
    visual, tokens = visual_inputs(config, size or _usual(family, config), images, generator)
    shown = torch.full((tokens,), image_token)
    parts = [text[:before], shown]
    for number in range(images - 1):
        parts += [text[before + after + number :][:1], shown]
    ids = torch.cat([*parts, text[before : before + after]])[None]
    _check_length(config, ids.shape[1], tokens, size)
    visual["pixel_values"] = visual["pixel_values"].to(model.dtype)
    if "mm_token_type_ids" in family.visual_inputs:
        visual["mm_token_type_ids"] = (ids == image_token).long()
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **visual}
    return {name: value.to(model.device) for name, value in given.items()}


def fixed_batch(
    model: Any, count: int, before: int = 35, after: int = 40, seed: int = 0, size: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """So many prompts as :func:`fixed_inputs` makes them, equally long, each with text and an image of its own.

    Methods that choose by content therefore keep different tokens, and as many as each prompt asks for, and different
    neurons. The first prompt is that of a batch of one.
    """
    prompts = [fixed_inputs(model, before, after, seed=seed + number, size=size) for number in range(count)]
    return {name: torch.cat([prompt[name] for prompt in prompts]) for name in prompts[0]}


def visual_inputs(
    config: Any, size: Sequence[int], images: int, generator: torch.Generator
) -> tuple[dict[str, Tensor], int]:
    """Random images as a family's processor would hand them over, and the visual tokens of each."""
    family, vision = family_of(config), config.vision_config
    height, width = size
    if isinstance(family, QwenVL):
        patch, merge = vision.patch_size, vision.spatial_merge_size
        rows, columns = height // patch, width // patch
        _check_multiple(size, patch * merge)
        pixels = torch.randn(images * rows * columns, 3 * vision.temporal_patch_size * patch**2, generator=generator)
        grids = torch.tensor([[1, rows, columns]] * images)
        return {"pixel_values": pixels, "image_grid_thw": grids}, rows * columns // merge**2
    if isinstance(family, InternVL):
        side = side_of(vision.image_size)
        _check_multiple(size, side)
        crops = (height // side) * (width // side)
        crops += crops > 1  # a thumbnail
        tokens = crops * int(side // side_of(vision.patch_size) * config.downsample_ratio) ** 2
        return {"pixel_values": torch.randn(images * crops, 3, side, side, generator=generator)}, tokens
    side = vision.image_size
    if isinstance(family, LlavaNext):
        rows, columns = family.crops(config, (height, width))
        pixels = torch.randn(images, 1 + rows * columns, 3, side, side, generator=generator)
        sizes = {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]] * images)}
        if "batch_num_images" in family.visual_inputs:
            sizes["batch_num_images"] = torch.ones(images, dtype=torch.long)
        return sizes, family.of_size(config, (height, width), small=False).count
    alike = family.image_tokens(config)
    assert alike is not None
    return {"pixel_values": torch.randn(images, 3, side, side, generator=generator)}, alike


def _usual(family: Family, config: Any) -> tuple[int, int]:
    vision = config.vision_config
    if isinstance(family, QwenVL):
        side = 16 * vision.patch_size * vision.spatial_merge_size
    else:
        side = side_of(vision.image_size) * (1 if family.image_tokens(config) else 2)
    return side, side


def _check_multiple(size: Sequence[int], multiple: int) -> None:
    if any(side < multiple or side % multiple for side in size):
        raise UserError(
            f"image_size={list(size)} is not valid: give a height and a width that are multiples of {multiple} pixels"
        )


def _check_length(config: Any, length: int, tokens: int, size: Sequence[int] | None) -> None:
    most = getattr(config.text_config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise UserError(
            f"image_size={list(size) if size else None} is too large: an image of {tokens} visual tokens makes a "
            f"prompt of {length} tokens, longer than the model's context of {most}"
        )
