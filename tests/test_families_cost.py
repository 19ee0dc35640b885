"""FLOPs and weights of every family against torch's own counts."""

from __future__ import annotations

import pytest
import torch
from small_families import SMALL_FAMILIES, inputs_of, noise, small_family
from torch.utils.flop_counter import FlopCounterMode

import corematching as cm
from corematching import groups
from corematching.cost.towers import tower_of
from corematching.efficiency.inputs import fixed_inputs, visual_inputs
from corematching.errors import UserError
from corematching.models.families import family_of
from corematching.models.loading import load_config
from corematching.models.support import refusal


@pytest.fixture(scope="module", params=SMALL_FAMILIES)
def small(request):
    model, processor = small_family(request.param)
    asked = [("What color is it ?", [noise(0, 150, 70), noise(1, 60, 170)])]
    return model, inputs_of(processor, asked)


def test_tower_and_projector_are_torchs_count(small):
    model, inputs = small
    family, tower = family_of(model.config), tower_of(model.config.to_dict())
    patches = [image.patches for image in family.images(model.config, inputs)]
    given = {name: inputs[name] for name in family.visual_inputs if name not in ("mm_token_type_ids",)}
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.model.get_image_features(**given)
    assert tower.flops(patches) + tower.projector_flops(patches) == pytest.approx(counter.get_total_flops(), rel=1e-3)


METHODS = [
    cm.build_method("dense"),
    *(cm.build_method(name, keep=0.5, layer=1) for name in ("random", "uniform", "pooling")),
    cm.build_method("fastv", keep=0.5, layer=2, per_image=True),
    cm.build_method("pyramiddrop", layers=[1, 2, 3], keeps=[0.8, 0.5, 0.2]),
    cm.build_method("dart", keep=0.5, layer=1, image_pivots=1, text_pivots=1),
    cm.build_method("sparsevlm", layers=[1, 2], schedule=[0.6, 0.3], keep=64),
    cm.build_method("topv", layer=1, keep=0.5),
    *(cm.build_method(name, keep=0.5) for name in ("h2o", "snapkv", "csp", "core_neurons", "random_neurons")),
    cm.build_method("corematching", layer=2),
]


def test_flops_are_torchs_count_for_every_method_that_runs(small):
    model, inputs = small
    for method in METHODS:
        if refusal(model.config, method):
            continue
        with (
            torch.inference_mode(),
            method(model) as trace,
            FlopCounterMode(display=False) as counter,
        ):
            model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert cm.flops(model.config, trace).total == pytest.approx(counter.get_total_flops(), rel=1e-3), method


def test_weights_are_the_models(small):
    model, tower = small[0], tower_of(small[0].config.to_dict())
    weights = {name: p.numel() for name, p in model.model.named_parameters() if p.dim() > 1}
    projector = {name for name in weights if "merger" in name or "multi_modal_projector" in name}
    vision = {name for name in weights if name.startswith(("vision_tower", "visual"))} - projector
    assert tower.weights == pytest.approx(sum(weights[name] for name in vision), rel=0.02)
    assert tower.projector_weights == pytest.approx(sum(weights[name] for name in projector), rel=0.02)


def test_inputs_for_timing_are_what_a_processor_makes(small):
    model, inputs = small
    family = family_of(model.config)
    made = fixed_inputs(model, before=3, after=4, images=2)
    assert made.keys() == inputs.keys()
    assert {name: value.dim() for name, value in made.items()} == {name: value.dim() for name, value in inputs.items()}
    tokens = family.visual_tokens(model.config, made)
    assert made["input_ids"].shape[1] == 3 + len(tokens) + 1 + 4
    assert len(tokens.images) == 2
    with torch.inference_mode():
        assert model(**made).logits.isfinite().all()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_an_image_size_that_the_model_cannot_take_is_one_line(name):
    model, _ = small_family(name)
    for size in ((1, 1), (57, 64), (0, 448)):
        with pytest.raises(UserError, match=r"^image_size=\[.*\] is not valid: give .* multiples of \d+ pixels$"):
            fixed_inputs(model, size=size)
    with pytest.raises(UserError, match=r"is too large: an image of \d+ visual tokens .* context of 4096$"):
        fixed_inputs(model, size=(56 * 64, 56 * 64))


OF_ANY_SIZE = [name for name in groups.choices("model") if "image_size" in groups.load("model", name)]


@pytest.mark.parametrize("name", OF_ANY_SIZE)
def test_model_files_say_what_their_image_becomes(name):
    chosen = groups.load("model", name)
    config = load_config(name, "random")
    inputs, tokens = visual_inputs(config, chosen["image_size"], 1, torch.Generator())
    assert tokens == chosen["visual_tokens"]
    assert config.text_config.num_hidden_layers == chosen["layers"]
    ids = torch.full((1, tokens), family_of(config).image_token_id(config))
    (image,) = family_of(config).images(config, {**inputs, "input_ids": ids})
    assert (image.count, list(image.patches)) == (tokens, chosen["image_patches"])
    assert family_of(config).vision_depth(config) == chosen["vision_layers"]
