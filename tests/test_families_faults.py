"""What a family cannot take is refused in one line that names it, by every road."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from small_families import SMALL_FAMILIES, inputs_of, noise, small_family

import corematching as cm
from corematching.answering.generator import Generator
from corematching.answering.prompts import Question
from corematching.errors import UserError
from corematching.evaluation import machine, provenance
from corematching.models.loading import load_config

DENSE = cm.build_method("dense")


def asked(images):
    return [Question("What color is it ?", lambda: images, {"max_new_tokens": 2}, "gqa, document 7")]


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


@pytest.fixture(scope="module", params=SMALL_FAMILIES)
def generator(request):
    return Generator(*small_family(request.param))


def test_a_video_is_refused_where_images_are_read(generator):
    for video in ("clip.mp4", [Image.new("RGB", (8, 8))], torch.zeros(4, 3, 8, 8)):
        with pytest.raises(UserError) as error:
            generator.answer(asked([video]), DENSE)
        assert "gqa, document 7" in one_line(error)
        assert "is no image" in one_line(error)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 2), (2, 300), (300, 2), (1, 900), (900, 1), (55, 57)])
def test_the_smallest_images_are_answered_or_refused_in_one_line(generator, width, height):
    refused = ""
    try:
        generator.answer(asked([noise(0, width, height)]), DENSE)
    except UserError as error:
        refused = str(error)
    assert not refused or refused.startswith("gqa, document 7: ")
    assert not refused or f"{width} x {height} pixels" in refused
    assert "\n" not in refused


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_an_image_that_is_too_long_names_its_size(name):
    with pytest.raises(UserError) as error:
        Generator(*small_family(name)).answer(asked([noise(0, 1, 900)]), DENSE)
    assert "an image of 1 x 900 pixels is too long" in one_line(error)


def test_an_image_without_pixels_is_refused(generator):
    with pytest.raises(UserError) as error:
        generator.answer(asked([Image.new("RGB", (0, 5))]), DENSE)
    assert "0 x 5 pixels" in one_line(error)


@pytest.mark.parametrize("name", [name for name in SMALL_FAMILIES if name != "llava"])
def test_llavas_own_recipe_is_refused_for_other_families(name):
    model, processor = small_family(name)
    for modes in ({"prompt": "llava15"}, {"image": "pad"}):
        with pytest.raises(UserError, match=f"does not fit {name} models: they take") as error:
            Generator(model, processor, **modes)
        one_line(error)


def test_a_prompt_beyond_the_context_is_refused(generator):
    limits = generator.model.config.get_text_config()
    before, limits.max_position_embeddings = limits.max_position_embeddings, 20
    try:
        with pytest.raises(UserError) as error:
            generator.answer(asked([noise(0, 300, 300)]), DENSE)
    finally:
        limits.max_position_embeddings = before
    assert "longer than the model's context of 20" in one_line(error)


def test_images_that_do_not_account_for_the_prompt_are_refused(generator):
    model = generator.model
    inputs = inputs_of(generator.processor, [("What ?", [noise(0, 120, 50)])])
    visual = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    short = {**inputs, "input_ids": inputs["input_ids"].clone()}
    short["input_ids"][0, visual[-3:]] = 5
    if "mm_token_type_ids" in short:
        short["mm_token_type_ids"] = (short["input_ids"] == model.config.image_token_id).long()
    with DENSE(model), torch.inference_mode(), pytest.raises((UserError, ValueError)) as error:
        model(**short)
    assert "\n" not in str(error.value)


def test_a_hub_revision_that_is_not_there_is_named(monkeypatch):
    def missing(*args, **kwargs):
        raise OSError("404 Client Error: revision not found\nmore")

    monkeypatch.setattr(machine, "cached_revision", lambda *args: None)
    monkeypatch.setattr(machine, "hub_reachable", lambda: True)
    monkeypatch.setattr(HfApi, "model_info", missing)
    chosen = {"path": "Qwen/Qwen2.5-VL-7B-Instruct", "revision": "nowhere", "weights": "pretrained"}
    with pytest.raises(UserError, match=r"'Qwen/Qwen2\.5-VL-7B-Instruct' at revision 'nowhere'") as error:
        provenance.model_revision(chosen)
    one_line(error)
    with pytest.raises(UserError, match="model 'qwen2_5_vl_7b' at revision 'nowhere' is not available") as error:
        load_config("qwen2_5_vl_7b", revision="nowhere")
    one_line(error)
