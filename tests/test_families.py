"""Every model family: small random checkpoints made offline, with real processors, behave as stock transformers."""

from __future__ import annotations

import pytest
import torch
from small_families import SMALL_FAMILIES, inputs_of, noise, save_small_family, small_family
from transformers import AutoModelForImageTextToText, AutoProcessor


@pytest.mark.parametrize("name", SMALL_FAMILIES)
def test_small_checkpoint_comes_back_from_a_folder_whole(name, tmp_path):
    folder = save_small_family(name, tmp_path)
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(folder)
    made, own = small_family(name)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    asked = [("What color is the circle ?", [noise(0, 90, 60)])]
    inputs, again = inputs_of(own, asked), inputs_of(processor, asked)
    assert inputs.keys() == again.keys()
    with torch.inference_mode():
        assert torch.equal(made(**inputs).logits, model(**again).logits)


@pytest.mark.parametrize("name", SMALL_FAMILIES)
def test_small_checkpoint_reads_images_of_any_size_and_number(name):
    model, processor = small_family(name)
    asked = [
        ("What color is it ?", [noise(0, 120, 50)]),
        ("Is the circle red ?", [noise(1, 60, 170), noise(2, 90, 90)]),
    ]
    inputs = inputs_of(processor, asked)
    visual = (inputs["input_ids"] == model.config.image_token_id).sum(1)
    assert visual.min() > 4
    assert visual[0] != visual[1]
    with torch.inference_mode():
        answers = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        seen = model(**inputs).logits[:, -1]
        inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
        blind = model(**inputs).logits[:, -1]
    assert answers.shape == (2, inputs["input_ids"].shape[1] + 4)
    assert not torch.allclose(seen, blind, atol=1e-2)
