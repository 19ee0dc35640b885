"""A LLaVA checkpoint small enough to be made in a test: random weights, 64 visual tokens, a real processor."""

from pathlib import Path

import torch
from transformers import CLIPImageProcessor, GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor

from corematching.training.architecture import TinyShape, build_config
from corematching.training.vocabulary import CHAT_TEMPLATE, build_tokenizer

SIDE = 112


def save_small_llava(folder: Path, seed: int = 0) -> Path:
    """Write model and processor to `folder`: 112-px images, 6 decoder layers of width 48, the bundled model's words."""
    tokenizer = build_tokenizer()
    shape = TinyShape(
        layers=6, width=48, ffn=96, heads=4, vision_layers=3, vision_width=32, vision_ffn=64, vision_heads=2
    )
    config = build_config(tokenizer, shape)
    config.vision_config.image_size = SIDE
    config.image_seq_length = (SIDE // 14) ** 2
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:  # spread out, so that answers depend on the image and no decision is a near tie
                parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
        model.lm_head.weight.data.normal_(0, 1.0)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
