"""Methods that choose at the vision tower's output, on families that pack its features into tokens."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small_families import SMALL_FAMILIES, inputs_of, noise, small_family

import corematching as cm
from corematching.engine.packed import with_newlines
from corematching.models.families import NEWLINE, family_of
from corematching.models.support import refusal

PACKED = [name for name in SMALL_FAMILIES if name != "llava"]
METHODS = {"fastervlm": {}, "divprune": {}, "tome_pre_llm": {}, "vtc_cls": {"layer": 1}}
ASKED = (("What color is it ?", [(0, 120, 50)]), ("Is it red or blue ?", [(1, 60, 170), (2, 90, 90)]))


@pytest.fixture(scope="module", params=PACKED)
def small(request):
    """A family's random model, a batch of two prompts with three images, and the prompts."""
    model, processor = small_family(request.param)
    asked = [(question, [noise(*picture) for picture in pictures]) for question, pictures in ASKED]
    return model, inputs_of(processor, asked), [inputs_of(processor, [one]) for one in asked]


def images(model, inputs):
    return family_of(model.config).visual_tokens(model.config, inputs)


@torch.inference_mode()
@pytest.mark.parametrize("name", METHODS)
def test_every_image_keeps_its_own_share(small, name):
    model, inputs, singles = small
    method = cm.build_method(name, keep=0.5, **METHODS[name])
    if reason := refusal(model.config, method):
        assert (model.config.model_type, name) == ("qwen2_5_vl", "vtc_cls"), reason
        with pytest.raises(cm.UserError, match=r"does not run on qwen2_5_vl models: .*windows only"), method(model):
            pass
        return
    counts = images(model, inputs).counts
    before = model(**inputs).logits
    with method(model) as trace:
        together = model(**inputs).logits
        first, second = trace.drain()
        for row, single in enumerate(singles):
            torch.testing.assert_close(model(**single).logits[0, -1], together[row, -1], rtol=0, atol=2e-5)
        alone = trace.drain()
    assert torch.equal(model(**inputs).logits, before)
    kept = [len(first.visual_tokens[0])]
    kept += [int((second.visual_tokens[0] < counts[1]).sum()), int((second.visual_tokens[0] >= counts[1]).sum())]
    wanted = [max(1, round(count / 2) if name == "divprune" else count // 2) for count in counts]
    assert kept == wanted
    for own, other in zip((first, second), alone, strict=True):
        assert torch.equal(own.visual_tokens[0], other.visual_tokens[0])
        assert own.overhead_flops == other.overhead_flops > 0


@torch.inference_mode()
@pytest.mark.parametrize("name", METHODS)
def test_keeping_everything_is_dense(small, name):
    model, inputs, _ = small
    method = cm.build_method(name, keep=1.0, **METHODS[name])
    if refusal(model.config, method) is None:
        with method(model):
            kept = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert torch.equal(kept, model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None))


def test_what_reads_single_patches_is_refused_in_one_line(small):
    model, _, _ = small
    for name, parameters in {
        "visionzip": {},
        "prumerge": {},
        "tome": {},
        "as_vit": {"layers": [1], "thresholds": [0.1]},
        "cdpruner": {},
    }.items():
        with pytest.raises(cm.UserError, match=f"method '{name}' does not run on {model.config.model_type}") as caught:
            cm.build_method(name, **parameters)(model).__enter__()
        assert "\n" not in str(caught.value)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_scores_are_packed_as_features_are(name):
    """Projected features, taken for scores, come out as the stock model's tokens."""
    model, processor = small_family(name)
    sizes = [(0, 120, 50), (1, 60, 170), (2, 220, 200), (3, 30, 200)]
    inputs = inputs_of(processor, [("What ?", [noise(*size)]) for size in sizes])
    family, tokens = family_of(model.config), images(model, inputs)
    told = {key: inputs[key] for key in ("image_sizes", "batch_num_images") if key in inputs}
    noted = []
    handle = model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: noted.append(output))
    stock = torch.cat(model.model.get_image_features(inputs["pixel_values"], **told).pooler_output)
    handle.remove()
    packed = family.of_tokens(model, noted[0].flatten(0, 1).T, inputs).T
    newline = tokens.kind == NEWLINE
    assert torch.equal(packed[~newline], stock[~newline])
    assert packed[newline].isnan().all()
    assert newline.sum() > len(sizes)


def test_a_newline_scores_the_mean_of_its_row():
    model, processor = small_family("llava_next")
    inputs = inputs_of(processor, [("What ?", [noise(0, 120, 50)])])
    tokens = images(model, inputs)
    scores = torch.rand(2, len(tokens)).masked_fill(tokens.kind == NEWLINE, math.nan)
    filled = with_newlines(scores, tokens.images[0])
    for place in (tokens.kind == NEWLINE).nonzero()[:, 0]:
        row = (tokens.tile == 1) & (tokens.row == tokens.row[place]) & (tokens.kind != NEWLINE)
        torch.testing.assert_close(filled[:, place], scores[:, row].mean(1))


@torch.inference_mode()
def test_windows_do_not_move_scores():
    """With full attention in every block, the order inside Qwen2.5-VL's tower cannot matter."""
    model, processor = small_family("qwen2_5_vl")
    inputs = inputs_of(processor, [("What ?", [noise(0, 190, 150)]), ("What ?", [noise(1, 90, 200)])])
    vision = model.model.visual
    vision.fullatt_block_indexes = list(range(len(vision.blocks)))
    kept = []
    for window in (vision.window_size, 100 * vision.window_size):
        vision.window_size = model.config.vision_config.window_size = window
        with cm.build_method("fastervlm", keep=0.4)(model) as trace:
            model(**inputs)
        kept.append([sample.visual_tokens[0].tolist() for sample in trace.samples])
    assert kept[0] == kept[1]


@torch.inference_mode()
def test_attention_received_is_that_of_the_tower():
    """OneVision's tower has no [CLS]: what eager attention gives each patch, on average, decides."""
    model, processor = small_family("llava_onevision")
    inputs = inputs_of(processor, [("What ?", [noise(0, 50, 50), noise(1, 60, 60)])])  # seen small: one crop each
    with cm.build_method("fastervlm", keep=5)(model) as trace:
        model(**inputs)
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    attention = tower(inputs["pixel_values"][:, 0], output_attentions=True).attentions[-1]
    scores = attention.mean((1, 2))
    scores = torch.cat([scores, scores.mean(1, keepdim=True)], 1)  # the newline behind each image
    right = [(image.topk(5).indices.sort().values + number * 17).tolist() for number, image in enumerate(scores)]
    assert trace.samples[0].visual_tokens[0].tolist() == [token for image in right for token in image]


@torch.inference_mode()
def test_tokens_of_several_patches_score_their_mean():
    for name, side in (("internvl", 2), ("qwen3_vl", None)):
        model, processor = small_family(name)
        inputs = inputs_of(processor, [("What ?", [noise(0, 120, 60)])])
        tokens = images(model, inputs)
        crops, rows, columns = tokens.images[0].patches
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
        if side is None:  # patches come in blocks of 2 x 2
            places = places.unflatten(0, (rows // 2, 2, columns // 2, 2)).transpose(1, 2).flatten(0, 3)
        scores = family_of(model.config).of_tokens(model, places.repeat(crops, 1).T, inputs)
        assert torch.equal(scores[0], 2 * tokens.row + 0.5)
        assert torch.equal(scores[1], 2 * tokens.column + 0.5)
