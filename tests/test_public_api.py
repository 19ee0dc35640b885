"""The public API, used as the design shows it, on the bundled model."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import corematching as cm


@pytest.fixture(scope="module")
def tiny():
    return cm.load_model("tiny")


@pytest.fixture(scope="module")
def inputs(tiny):
    from corematching.benchmarks.mini.drawing import render
    from corematching.benchmarks.mini.scenes import make_scene

    _, processor = tiny
    images: list[Image.Image] = [render(make_scene(seed, "test")) for seed in (0, 1)]
    prompts = [
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the user's questions. USER: <image>\n{question} ASSISTANT:"
        for question in ("Is there a red square?", "How many objects are there in the picture?")
    ]
    return processor(images=images, text=prompts, padding=True, return_tensors="pt")


@torch.no_grad()
def test_the_example_of_the_readme(tiny, inputs):
    model, processor = tiny
    method = cm.build_method("fastv", keep=64)
    with method(model) as trace:
        out = model.generate(**inputs, max_new_tokens=16)
    assert processor.batch_decode(out)
    depth = model.config.text_config.num_hidden_layers
    for sample in trace.samples:
        assert [len(tokens) for tokens in sample.visual_tokens] == [576] * 2 + [64] * (depth - 2)
    cost = cm.flops(model.config, trace)
    assert cost.total == pytest.approx(
        cost.vision + cost.projector + cost.prefill + cost.decode + cost.lm_head + cost.overhead
    )

    joined = cm.compose(cm.build_method("visionzip", dominant=54), cm.build_method("core_neurons", keep=0.4))
    with joined(model) as trace:
        model.generate(**inputs, max_new_tokens=4)
    assert all(
        len(neurons) == int(0.4 * model.config.text_config.intermediate_size) for neurons in trace.samples[0].neurons
    )


def test_bundled_model_is_small_and_standard(tiny):
    model, processor = tiny
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert model.config.text_config.num_hidden_layers >= 8
    ids = processor.tokenizer(processor.image_token, add_special_tokens=False).input_ids
    assert ids == [model.config.image_token_id]
    assert processor.tokenizer.padding_side == "left"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name_or_path": "nonsense"}, "unknown model 'nonsense'.*tiny"),
        ({"name_or_path": "tiny", "weights": "best"}, "weights='best'.*random"),
        ({"name_or_path": "tiny", "dtype": "int3"}, "dtype='int3'.*bfloat16"),
        ({"name_or_path": "tiny", "num_layers": 99}, "num_layers=99.*1 to"),
    ],
)
def test_loading_errors_are_one_line(arguments, message):
    with pytest.raises(cm.UserError, match=message) as error:
        cm.load_model(**arguments)
    assert "\n" not in str(error.value)


def test_random_weights_need_no_download_and_are_seeded():
    first, _ = cm.load_model("tiny", weights="random", num_layers=2)
    second, _ = cm.load_model("tiny", weights="random", num_layers=2)
    assert len(first.model.language_model.layers) == 2
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
