"""Checkpoints of every model family small enough to be made in a test: random weights, four layers, real processors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from corematching.training.vocabulary import CHAT_TEMPLATE, build_tokenizer

SIDE = 56
"""Pixels of a tile's side in the families that cut images into tiles."""
PINPOINTS = [[rows * SIDE, columns * SIDE] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
"""Of LLaVA-NeXT's shape."""
MANY_PINPOINTS = [[rows * SIDE, columns * SIDE] for rows in range(1, 5) for columns in range(1, 5)]
"""Of LLaVA-OneVision's shape; the larger ones exceed ``anyres_max_4``, so that its features are resized."""
CHATML = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' and SYSTEM -%}
{{ '<|im_start|>system\\n' ~ SYSTEM ~ '<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' ~ message['role'] ~ 'AFTER' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ 'IMAGE' }}{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def _chatml(image: str, after: str = "\\n", system: str = "") -> str:
    """A chat template of the Qwen kind: what stands for an image, behind a role, and as the first turn."""
    return CHATML.replace("IMAGE", image).replace("AFTER", after).replace("SYSTEM", repr(system))


QWEN_VL = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
INTERNVL = ("<IMG_CONTEXT>", "<video>", "<img>", "</img>")
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 14,
}


@dataclass(frozen=True)
class SmallFamily:
    """How a small checkpoint of one family is made.

    Attributes
    ----------
    special
        Tokens that its processor adds to the bundled vocabulary.
    template
        Its chat template, of the form of the published one.
    config
        Its architecture, but for ids of tokens.
    processor
        Makes its processor from the tokenizer and the template.
    named
        Tokens that the tokenizer knows by name, which the processor asks for.
    """

    special: tuple[str, ...]
    template: str
    config: dict[str, Any]
    processor: Callable[[Any, str], Any]
    named: tuple[tuple[str, str], ...] = ()

    def ids(self, tokenizer: Any) -> dict[str, int]:
        """The config's token ids."""
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        tokens = self.special or ("<image>",)
        own = dict(zip(names, tokenizer.convert_tokens_to_ids(list(tokens)), strict=False))
        model_type = self.config["model_type"]
        if model_type.startswith("llava"):
            return {name.replace("_id", "_index"): number for name, number in own.items() if name in names[:2]}
        return {"image_token_id": own["image_token_id"]} if model_type == "internvl" else own


def _llava(tokenizer: Any, template: str) -> Any:
    crop = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def _llava_next(tokenizer: Any, template: str) -> Any:
    images = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    return LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def _llava_onevision(tokenizer: Any, template: str) -> Any:
    size = {"height": SIDE, "width": SIDE}
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=MANY_PINPOINTS),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(SIDE // 14) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        chat_template=template,
    )


def _qwen2_5_vl(tokenizer: Any, template: str) -> Any:
    images = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=28 * 28 * 24)
    return Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=template)


def _qwen3_vl(tokenizer: Any, template: str) -> Any:
    images = Qwen2VLImageProcessor(patch_size=16, min_pixels=64 * 64, max_pixels=32 * 32 * 24)
    return Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=template)


def _internvl(tokenizer: Any, template: str) -> Any:
    size = {"height": SIDE, "width": SIDE}
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=4),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=template,
    )


SMALL_FAMILIES: dict[str, SmallFamily] = {
    "llava": SmallFamily(
        (),
        CHAT_TEMPLATE,
        {
            "model_type": "llava",
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": CLIP,
            "vision_feature_select_strategy": "default",
            "vision_feature_layer": -2,
            "image_seq_length": (SIDE // 14) ** 2,
        },
        _llava,
    ),
    "llava_next": SmallFamily(
        (),
        CHAT_TEMPLATE,
        {
            "model_type": "llava_next",
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": CLIP,
            "image_grid_pinpoints": PINPOINTS,
            "vision_feature_select_strategy": "default",
            "vision_feature_layer": -2,
            "image_seq_length": (SIDE // 14) ** 2,
        },
        _llava_next,
    ),
    "llava_onevision": SmallFamily(
        ("<image>", "<video>"),
        _chatml("<image>", after=" "),
        {
            "model_type": "llava_onevision",
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": {**CLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
            "image_grid_pinpoints": MANY_PINPOINTS,
            "vision_aspect_ratio": "anyres_max_4",
        },
        _llava_onevision,
    ),
    "qwen2_5_vl": SmallFamily(
        QWEN_VL,
        _chatml("<|vision_start|><|image_pad|><|vision_end|>", system="You are a helpful assistant."),
        {
            "model_type": "qwen2_5_vl",
            "text_config": {
                "model_type": "qwen2_5_vl_text",
                **TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
            },
            "vision_config": {
                "model_type": "qwen2_5_vl_vision",
                "depth": 4,
                "hidden_size": 24,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": TEXT["hidden_size"],
                "window_size": 56,
                "fullatt_block_indexes": [1, 3],
            },
        },
        _qwen2_5_vl,
        (("image_token", QWEN_VL[0]), ("video_token", QWEN_VL[1])),
    ),
    "qwen3_vl": SmallFamily(
        QWEN_VL,
        _chatml("<|vision_start|><|image_pad|><|vision_end|>"),
        {
            "model_type": "qwen3_vl",
            "text_config": {
                "model_type": "qwen3_vl_text",
                **TEXT,
                "head_dim": 16,  # not width / heads, as in the released ones
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 5e6,
                    "mrope_section": [4, 2, 2],
                    "mrope_interleaved": True,
                },
            },
            "vision_config": {
                "model_type": "qwen3_vl_vision",
                "depth": 4,
                "hidden_size": 24,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": TEXT["hidden_size"],
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1, 2],
            },
        },
        _qwen3_vl,
        (("image_token", QWEN_VL[0]), ("video_token", QWEN_VL[1])),
    ),
    "internvl": SmallFamily(
        INTERNVL,
        _chatml("<IMG_CONTEXT>\\n"),
        {
            "model_type": "internvl",
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": {
                "model_type": "internvl_vision",
                "hidden_size": 24,
                "intermediate_size": 32,
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "attention_bias": True,
                "image_size": [SIDE, SIDE],
                "patch_size": [14, 14],
            },
            "image_seq_length": 4,
            "tie_word_embeddings": False,
        },
        _internvl,
        tuple(zip(("context_image_token", "video_token", "start_image_token", "end_image_token"), INTERNVL)),
    ),
}


def small_family(name: str, seed: int = 0) -> tuple[Any, Any]:
    """A random model in eval mode and its processor."""
    family, tokenizer = SMALL_FAMILIES[name], build_tokenizer()
    tokenizer.add_tokens([*family.special, "<|im_start|>", "<|im_end|>"], special_tokens=True)
    if family.named:
        tokenizer._set_model_specific_special_tokens(dict(family.named))
    config = AutoConfig.for_model(**family.config, **family.ids(tokenizer))
    text = config.text_config
    text.vocab_size, text.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = AutoModelForImageTextToText.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:  # spread out, so that answers depend on the image and no decision is a near tie
                parameter.data.normal_(0, parameter.shape[1:].numel() ** -0.5)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model, family.processor(tokenizer, family.template)


def save_small_family(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a family's random model and its processor to `folder`."""
    model, processor = small_family(name, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def noise(seed: int, width: int, height: int) -> Image.Image:
    """An image of coarse random colours, so that its patches differ."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(0, 256, (max(height // 7, 1), max(width // 7, 1), 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(cells.numpy()).resize((width, height), Image.Resampling.NEAREST)


def inputs_of(processor: Any, asked: Sequence[tuple[str, Sequence[Image.Image]]]) -> dict[str, Any]:
    """One left-padded batch of questions, images first, through the family's own chat template and processor."""
    texts = []
    for question, images in asked:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    pictures = [list(images) for _, images in asked]
    return dict(processor(text=texts, images=pictures, padding=True, return_tensors="pt"))
