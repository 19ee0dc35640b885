"""Shared fixtures: a small random LLaVA (64 visual tokens, 6 layers) and prompts for it."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPConfig, CLIPModel, PreTrainedTokenizerFast

IMAGE_TOKEN = 99
IMAGE_TOKENS = 64


@pytest.fixture(scope="session")
def random_llava():
    """A LLaVA with random weights: 112-px images, 64 visual tokens, 6 decoder layers of width 32, FFN width 48."""
    config = AutoConfig.for_model(
        "llava",
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 112,
            "patch_size": 14,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 100,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        image_token_id=IMAGE_TOKEN,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).eval()
        # Default initialisation is so small that every decision is a near tie; spread it out.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    model.generation_config.pad_token_id = 0
    return model


def make_prompt(seed: int, text: int = 12, images: int = 1) -> dict[str, torch.Tensor]:
    """One prompt: BOS, ``images`` visual spans with text between them, then ``text`` question tokens."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.tensor([1])]
    for _ in range(images):
        parts += [torch.randint(3, 99, (4,), generator=generator), torch.full((IMAGE_TOKENS,), IMAGE_TOKEN)]
    parts.append(torch.randint(3, 99, (text,), generator=generator))
    ids = torch.cat(parts)[None]
    pixels = torch.randn(images, 3, 112, 112, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def left_pad(prompts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One left-padded batch of several prompts."""
    width = max(prompt["input_ids"].shape[1] for prompt in prompts)

    def pad(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (width - tensor.shape[1], 0))

    return {
        "input_ids": torch.cat([pad(prompt["input_ids"]) for prompt in prompts]),
        "attention_mask": torch.cat([pad(prompt["attention_mask"]) for prompt in prompts]),
        "pixel_values": torch.cat([prompt["pixel_values"] for prompt in prompts]),
    }


@pytest.fixture(scope="session")
def prompts() -> list[dict[str, torch.Tensor]]:
    """Three prompts of different lengths; the last holds two images."""
    return [make_prompt(0, text=5), make_prompt(1, text=17), make_prompt(2, text=9, images=2)]


@pytest.fixture(scope="session")
def small_guide(random_llava, tmp_path_factory):
    """Folder of a second random LLaVA with the same visual tokens and vocabulary, two decoder layers deep."""
    config = AutoConfig.for_model(**random_llava.config.to_dict())
    config.text_config.num_hidden_layers = 2
    with torch.random.fork_rng():
        torch.manual_seed(7)
        guide = AutoModelForImageTextToText.from_config(config)
        for parameter in guide.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    folder = tmp_path_factory.mktemp("guide")
    guide.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def predictor_file(random_llava, tmp_path_factory):
    """Neuron predictors of ``random_llava``, trained for a moment."""
    from corematching.engine.predictors import save_predictors
    from corematching.training.predictors import collect, train_predictor

    samples = collect(random_llava, [make_prompt(seed) for seed in range(20, 26)], answer_tokens=4)
    predictors = {layer: train_predictor(own, 0.3, rank=16, steps=60)[0] for layer, own in samples.items()}
    path = tmp_path_factory.mktemp("predictors") / "predictors.safetensors"
    save_predictors(path, predictors, {})
    return str(path)


@pytest.fixture(scope="session")
def router_file(random_llava, tmp_path_factory):
    """A router of ``focusllava`` for ``random_llava``, with random weights."""
    path = tmp_path_factory.mktemp("router") / "router.pt"
    torch.save({"router": torch.randn(3, 65, generator=torch.Generator().manual_seed(5))}, path)
    return str(path)


@pytest.fixture(scope="session")
def text_model(tmp_path_factory):
    """A random CLIP of the tower's width with its own tokenizer: path of a folder."""
    folder = tmp_path_factory.mktemp("clip")
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 100, "max_position_embeddings": 8, "eos_token_id": 99, "bos_token_id": 98}
    vision = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        CLIPModel(config).save_pretrained(folder)
    word_tokenizer(ends=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def readable_llava(random_llava, tmp_path, monkeypatch):
    """The random LLaVA with a tokenizer where it came from."""
    word_tokenizer(ends=False).save_pretrained(tmp_path)
    monkeypatch.setattr(random_llava.config, "_name_or_path", str(tmp_path))
    return random_llava


def word_tokenizer(ends):
    """One word per id; CLIP's ends every text with its end token."""
    words = {f"word{index}": index for index in range(98)} | {"ASSISTANT:": 98, "</s>": 99}
    base = Tokenizer(WordLevel(words, unk_token="</s>"))
    base.pre_tokenizer = WhitespaceSplit()
    if ends:
        base.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 99)])
    return PreTrainedTokenizerFast(tokenizer_object=base, eos_token="</s>")
