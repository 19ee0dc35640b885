"""From a question and its images to the text and pixels a model is fed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from corematching.answering.recipes import Recipe
from corematching.errors import UserError

PROMPTS = ("llava15", "lmms_eval")
IMAGE_MODES = ("pad", "processor")
VICUNA_V1 = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: {turn} ASSISTANT:"
)


def check_choices(prompt: str | None, image: str | None) -> None:
    """Refuse an unknown prompt or image mode; None means the usual one of the model's family.

    Raises
    ------
    UserError
        Names the valid ones.
    """
    if prompt is not None and prompt not in PROMPTS:
        raise UserError(f"unknown prompt '{prompt}'; valid: {', '.join(PROMPTS)}")
    if image is not None and image not in IMAGE_MODES:
        raise UserError(f"unknown image mode '{image}'; valid: {', '.join(IMAGE_MODES)}")


def plain(question: str, processor: Any) -> str:
    """A question's text in which nothing is a special token: ``<image>`` and its like get a space after their first
    character, so that the model reads them as text and an image stands only where one is."""
    tokenizer = processor.tokenizer
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    for token in sorted({*special, processor.image_token}, key=len, reverse=True):
        if len(token) > 1:
            question = question.replace(token, f"{token[0]} {token[1:]}")
    return question


def render(processor: Any, question: str, images: int, prompt: str, system: str | None = None) -> str:
    """The whole prompt of one question, ready for the processor.

    Parameters
    ----------
    processor
        A transformers processor; its image token and chat template are used.
    question
        The benchmark's text; special tokens in it stay text (see `plain`).
    images
        How many images precede it.
    prompt
        ``llava15``: the ``vicuna_v1`` conversation of the official LLaVA-1.5 evaluation, images first, each on its own
        line. ``lmms_eval``: the checkpoint's own chat template, as lmms-eval's stock wrappers do.
    system
        Text of a system turn in front, for ``lmms_eval``; None leaves that to the template.

    Raises
    ------
    UserError
        For an unknown `prompt`, or ``lmms_eval`` with a checkpoint that has no chat template.
    """
    if prompt == "llava15":
        return VICUNA_V1.format(turn=f"{processor.image_token}\n" * images + plain(question, processor))
    if prompt != "lmms_eval":
        raise UserError(f"unknown prompt '{prompt}'; valid: {', '.join(PROMPTS)}")
    if not getattr(processor, "chat_template", None):
        raise UserError(
            "prompt='lmms_eval' needs a checkpoint with a chat template; this one has none: use prompt=llava15"
        )
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": plain(question, processor)}]
    messages = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as 8-bit RGB.

    Colour, palette and CMYK images convert as Pillow does it and transparency is dropped, as in the official LLaVA
    evaluation. Grey images of more than 8 bits, whose values Pillow would clip at 255, are scaled: 16-bit modes from
    0-65535; mode I likewise if any value exceeds 255; mode F from 0-1 if nothing exceeds 1, else as mode I.
    """
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    grey = np.nan_to_num(np.asarray(image).astype(np.float64))
    if image.mode == "F" and grey.max() <= 1:
        grey = grey * 255
    elif image.mode.startswith("I;16") or grey.max() > 255:
        grey = grey / 257
    return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")


def _named(what: object) -> str:
    """Something that is no image, in a few words."""
    text = " ".join(str(what).split())
    return repr(text[:80]) if isinstance(what, str) else f"a {type(what).__name__}"


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """`image` in the middle of the smallest square that holds it, the rest filled with `colour` (RGB, 0-255)."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def prepare_images(
    images: Sequence[Image.Image], mode: str, processor: Any, recipe: Recipe | None = None
) -> list[Image.Image]:
    """RGB images as the processor gets them; see `to_rgb` for other kinds.

    ``pad`` pads to a square with the processor's mean colour, as the official LLaVA-1.5 recipe
    (``image_aspect_ratio=pad``); ``processor`` leaves shape to the family's `recipe` and to the processor, which crops
    for LLaVA-1.5's CLIP.

    Raises
    ------
    UserError
        For an unknown `mode`, an image without pixels or of a shape the family cannot take, or what is no image.
    """
    for image in images:
        if not isinstance(image, Image.Image):
            raise UserError(f"{_named(image)} is no image: questions about images only are answered, not about videos")
        if 0 in image.size:
            raise UserError(f"an image of {image.size[0]} x {image.size[1]} pixels cannot be shown to a model")
    rgb = [to_rgb(image) for image in images]
    if mode == "processor":
        return rgb if recipe is None else [recipe.sized(image) for image in rgb]
    if mode != "pad":
        raise UserError(f"unknown image mode '{mode}'; valid: {', '.join(IMAGE_MODES)}")
    red, green, blue = (int(255 * channel) for channel in processor.image_processor.image_mean)
    return [pad_to_square(image, (red, green, blue)) for image in rgb]
