"""From a question and its images to the text and pixels a model is fed."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from corematching.errors import UserError

PROMPTS = ("llava15", "lmms_eval")
IMAGE_MODES = ("pad", "processor")
VICUNA_V1 = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: {turn} ASSISTANT:"
)


def render(processor: Any, question: str, images: int, prompt: str) -> str:
    """The whole prompt of one question, ready for the processor.

    Parameters
    ----------
    processor
        A transformers processor; its image token and chat template are used.
    question
        The benchmark's text.
    images
        How many images precede it.
    prompt
        ``llava15``: the ``vicuna_v1`` conversation of the official LLaVA-1.5 evaluation, images first, each on its own
        line. ``lmms_eval``: the checkpoint's own chat template, as lmms-eval's stock wrappers do.

    Raises
    ------
    UserError
        For an unknown `prompt`, or ``lmms_eval`` with a checkpoint that has no chat template.
    """
    if prompt == "llava15":
        return VICUNA_V1.format(turn=f"{processor.image_token}\n" * images + question)
    if prompt != "lmms_eval":
        raise UserError(f"unknown prompt '{prompt}'; valid: {', '.join(PROMPTS)}")
    if not getattr(processor, "chat_template", None):
        raise UserError(
            "prompt='lmms_eval' needs a checkpoint with a chat template; this one has none: use prompt=llava15"
        )
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """`image` in the middle of the smallest square that holds it, the rest filled with `colour` (RGB, 0-255)."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def prepare_images(images: Sequence[Image.Image], mode: str, processor: Any) -> list[Image.Image]:
    """RGB images as the processor gets them.

    ``pad`` pads to a square with the processor's mean colour, as the official LLaVA-1.5 recipe
    (``image_aspect_ratio=pad``); ``processor`` leaves shape to the processor, which crops for CLIP.

    Raises
    ------
    UserError
        For an unknown `mode`, or an image without pixels.
    """
    for image in images:
        if 0 in image.size:
            raise UserError(f"an image of {image.size[0]} x {image.size[1]} pixels cannot be shown to a model")
    rgb = [image.convert("RGB") for image in images]
    if mode == "processor":
        return rgb
    if mode != "pad":
        raise UserError(f"unknown image mode '{mode}'; valid: {', '.join(IMAGE_MODES)}")
    red, green, blue = (int(255 * channel) for channel in processor.image_processor.image_mean)
    return [pad_to_square(image, (red, green, blue)) for image in rgb]
