"""Budgets per image for methods that choose inside the LLM."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from conftest import IMAGE_TOKENS, left_pad, make_prompt

import corematching as cm
from corematching.methods.base import BeforeLayer, Method
from corematching.methods.core import voting
from corematching.methods.per_image import PerImage

METHODS = {
    "fastv": {"layer": 2, "keep": 11},
    "random": {"keep": 11},
    "uniform": {"keep": 11},
    "pyramiddrop": {"layers": [1, 3], "keeps": [0.5, 11]},
    "topv": {"layer": 1, "keep": 11},
    "core_tokens": {"keep": 11},
    "corematching": {"keep": 11},
}


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_every_image_keeps_its_share(name, random_llava):
    two, one, three = make_prompt(2, text=9, images=2), make_prompt(1, text=17), make_prompt(4, text=5, images=3)
    method = cm.build_method(name, per_image=True, **METHODS[name])
    with method(random_llava) as trace:
        random_llava(**left_pad([two, one, three]))
        batch = trace.drain()
        for prompt in (two, one, three):
            random_llava(**prompt)
        alone = trace.drain()
    for sample, expected in zip(batch, ([6, 5], [11], [4, 4, 3]), strict=True):
        kept = sample.visual_tokens[-1]
        assert [int((kept // IMAGE_TOKENS == image).sum()) for image in range(len(expected))] == expected
    for own, other in zip(batch, alone, strict=True):
        assert all(map(torch.equal, own.visual_tokens, other.visual_tokens))
        assert own.overhead_flops == other.overhead_flops
    with cm.build_method(name, **METHODS[name])(random_llava) as trace:
        random_llava(**one)
    assert all(map(torch.equal, trace.samples[0].visual_tokens, alone[1].visual_tokens))


@torch.no_grad()
def test_fastv_ranks_within_each_image(random_llava):
    """The last token's attention by hand, image by image."""
    prompt = make_prompt(2, text=9, images=2)
    kernel = random_llava.config._attn_implementation
    random_llava.set_attn_implementation("eager")
    attention = random_llava(**prompt, output_attentions=True).attentions[1][0, :, -1].mean(0)
    random_llava.set_attn_implementation(kernel)
    visual = (prompt["input_ids"][0] == 99).nonzero()[:, 0]
    paid = attention[visual].unflatten(0, (2, IMAGE_TOKENS))
    right = torch.cat([paid[image].topk(5).indices.sort().values + image * IMAGE_TOKENS for image in range(2)])
    with cm.build_method("fastv", layer=2, keep=10, per_image=True)(random_llava) as trace:
        random_llava(**prompt)
    assert trace.samples[0].visual_tokens[2].tolist() == right.tolist()


@torch.no_grad()
def test_merged_tokens_stay_with_their_image(random_llava):
    method = cm.build_method("sparsevlm", schedule=[20, 8], layers=[1, 3], per_image=True)
    prompts = [make_prompt(2, text=9, images=2), make_prompt(1, text=17)]
    with method(random_llava) as trace:
        together = random_llava.generate(**left_pad(prompts), max_new_tokens=3, do_sample=False, eos_token_id=None)
        batch = trace.drain()
        alone = [random_llava.generate(**p, max_new_tokens=3, do_sample=False, eos_token_id=None) for p in prompts]
    for row, own in enumerate(alone):
        assert torch.equal(together[row, -3:], own[0, -3:])
    first = batch[0].visual_tokens[2]
    assert [int((first // IMAGE_TOKENS == image).sum()) for image in range(2)] == [10, 10]
    assert (first == -1).sum() > 0


@torch.no_grad()
def test_a_guides_scores_are_ranked_image_by_image(random_llava, small_guide):
    with cm.build_method("sgl", guide=small_guide, keep=11, per_image=True)(random_llava) as trace:
        random_llava.generate(**make_prompt(2, text=9, images=2), max_new_tokens=2)
    kept = trace.samples[0].visual_tokens[-1]
    assert [int((kept // IMAGE_TOKENS == image).sum()) for image in range(2)] == [6, 5]


def test_parameters_and_refusals(random_llava):
    method = cm.build_method("fastv", layer=2, keep=11, per_image=True)
    assert method.name == "fastv"
    assert method.parameters == {"layer": 2, "keep": 11, "depth_fraction": None, "per_image": True}
    assert "per_image" not in cm.build_method("fastv", per_image=False).parameters
    cm.compose(method, cm.build_method("core_neurons"))
    with pytest.raises(cm.UserError, match="both reduce tokens"):
        cm.compose(method, cm.build_method("random"))
    with pytest.raises(cm.UserError, match="per_image='yes' is not valid"):
        cm.build_method("fastv", per_image="yes")
    for name, parameters in (("visionzip", {"keep": 16}), ("snapkv", {}), ("dense", {})):
        with pytest.raises(cm.UserError, match=f"per_image=True is not valid for {name}"):
            cm.build_method(name, per_image=True, **parameters)(random_llava).__enter__()
    few = cm.build_method("fastv", layer=2, keep=2, per_image=True)
    with few(random_llava), pytest.raises(cm.UserError, match="keep=2 cannot be shared by 3 images"):
        random_llava(**make_prompt(4, images=3))


@torch.no_grad()
def test_another_images_tokens_do_not_vote_as_text(random_llava):
    """Asked about one image at a time, "text" is still the prompt's text."""
    seen = []

    @dataclass(frozen=True)
    class Note(Method):
        def stages(self, geometry):
            return [BeforeLayer(1, self.note)]

        def note(self, view):
            seen.append(voting(view.valid, view.visual_mask, "text").sum(1).tolist())

    prompt = make_prompt(2, text=9, images=2)
    with PerImage(Note())(random_llava):
        random_llava(**prompt)
    assert seen == [[1 + 4 + 4 + 9]] * 2
