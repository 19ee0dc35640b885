"""Save the tiny model as a standard Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessor,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from corematching.benchmarks.mini.scenes import IMAGE_SIZE, PATCH
from corematching.training.vocabulary import IMAGE_TOKEN


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """LLaVA-1.5's processor: CLIP images of 336 px, one ``<image>`` expanded to 576 visual tokens."""
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )


def export(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path, dtype=torch.float16
) -> None:
    """Write configuration, half-precision weights, tokenizer, processor and greedy generation defaults to `folder`."""
    half = LlavaForConditionalGeneration(model.config)
    half.load_state_dict(model.state_dict())
    half = half.to(dtype)
    half.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    half.save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
