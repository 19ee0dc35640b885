"""Every model family: small random checkpoints made offline, with real processors, behave as stock transformers."""

from __future__ import annotations

import pytest
import torch
from masked import NEW, answered, hidden_keys, lengthened
from small_families import SMALL_FAMILIES, inputs_of, noise, save_small_family, small_family
from transformers import AutoModelForImageTextToText, AutoProcessor

from corematching.models.families import NEWLINE, family_of


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


@pytest.mark.parametrize("name", SMALL_FAMILIES)
def test_every_image_accounts_for_its_placeholders(name):
    model, processor = small_family(name)
    family = family_of(model.config)
    sizes = [(56, 56), (57, 300), (300, 57), (113, 112), (168, 90), (224, 224), (230, 111), (90, 400)]
    for seed, (width, height) in enumerate(sizes):
        inputs = inputs_of(processor, [("What ?", [noise(seed, width, height)])])
        tokens = family.visual_tokens(model.config, inputs)
        assert len(tokens) == int((inputs["input_ids"] == model.config.image_token_id).sum()), (width, height)
        assert tokens.counts == [len(tokens)]
    asked = [("What ?", [noise(0, 57, 300), noise(1, 120, 60)]), ("Is ?", [noise(2, 224, 224)])]
    tokens = family.visual_tokens(model.config, inputs_of(processor, asked))
    assert [int((tokens.image == image).sum()) for image in range(3)] == tokens.counts
    assert bool((tokens.kind == NEWLINE).any()) == (name in ("llava_next", "llava_onevision"))


@pytest.mark.parametrize("name", SMALL_FAMILIES)
def test_the_oracle_that_hides_nothing_is_stock_generation(name):
    model, processor = small_family(name)
    asked = [("What ?", [noise(0, 57, 300), noise(1, 120, 60)]), ("Is it red ?", [noise(2, 224, 224)])]
    inputs = inputs_of(processor, asked)
    tokens, logits = answered(model, inputs)
    longer, layers = lengthened(inputs, tokens[:, :NEW]), family_of(model.config).decoder(model).layers
    seen = [longer["attention_mask"].bool()] * len(layers)
    with torch.inference_mode(), hidden_keys(layers, seen):
        whole = model(**longer).logits[:, -NEW - 1 :]
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)
    gone = seen[0].clone()
    gone[:, longer["input_ids"].shape[1] - NEW - 20] = False
    with torch.inference_mode(), hidden_keys(layers, [*seen[:-1], gone]):
        assert not torch.allclose(model(**longer).logits[:, -NEW - 1 :], whole, atol=1e-3)
