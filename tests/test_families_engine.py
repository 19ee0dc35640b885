"""What every family promises of the engine: dense is stock, dropping is hiding keys, batches are their prompts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from masked import NEW, answered, hidden_keys, keys_left, lengthened
from small_families import inputs_of, noise, small_family

import corematching as cm
from corematching.methods.base import BeforeLayer, Method
from corematching.models.families import family_of

NAMES = ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"]


@dataclass(frozen=True)
class Twice(Method):
    """Drops at two layers."""

    def stages(self, geometry):
        first, second = (cm.build_method("random", keep=keep, seed=seed) for keep, seed in ((0.6, 0), (0.5, 1)))
        return [BeforeLayer(1, first.select), BeforeLayer(3, second.select)]


DROPS = {
    "random before the LLM": cm.build_method("random", keep=0.5, layer=-1),
    "random at layer 1": cm.build_method("random", keep=0.4, layer=1),
    "random at layer 3": cm.build_method("random", keep=0.3, layer=3),
    "random at layers 1 and 3": Twice(),
    "fastv": cm.build_method("fastv", keep=0.5, layer=2),
    "fastv per image": cm.build_method("fastv", keep=0.5, layer=2, per_image=True),
}
ASKED = (
    ("What color is it ?", [(0, 120, 50)]),
    ("Is the circle red or blue ?", [(1, 60, 170), (2, 90, 90)]),
    ("How many ?", [(3, 90, 60)]),
)


@pytest.fixture(scope="module", params=NAMES)
def small(request):
    """A family's random model with a batch: three prompts of different images, one of them with two."""
    model, processor = small_family(request.param)
    asked = [(question, [noise(*picture) for picture in pictures]) for question, pictures in ASKED]
    return model, inputs_of(processor, asked), [inputs_of(processor, [one]) for one in asked]


def test_dense_is_stock_bit_for_bit_and_leaves_nothing_behind(small):
    model, inputs, _ = small
    before = set(vars(model)), set(vars(model.model)), set(vars(family_of(model.config).decoder(model)))
    stock = answered(model, inputs)
    with cm.build_method("dense")(model) as trace:
        tokens, logits = answered(model, inputs)
        with torch.inference_mode():
            attached = model(**inputs).logits
    assert torch.equal(tokens, stock[0])
    assert torch.equal(logits, stock[1])
    visual = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
    assert [sample.image_tokens for sample in trace.samples[:3]] == visual
    assert [sample.images for sample in trace.samples[:3]] == [1, 2, 1]
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, attached)
    assert (set(vars(model)), set(vars(model.model)), set(vars(family_of(model.config).decoder(model)))) == before


@pytest.mark.parametrize("method", ["random", "fastv"])
def test_keeping_all_is_dense(small, method):
    model, inputs, _ = small
    stock = answered(model, inputs)
    with cm.build_method(method, keep=1.0)(model):
        tokens, logits = answered(model, inputs)
    assert torch.equal(tokens, stock[0])
    torch.testing.assert_close(logits, stock[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("drop", DROPS)
def test_dropping_is_hiding_keys_of_a_stock_model_in_prefill_and_in_five_decoded_tokens(small, drop):
    model, inputs, _ = small
    with DROPS[drop](model) as trace:
        tokens, logits = answered(model, inputs)
    left = keys_left(inputs, model.config.image_token_id, trace.samples)
    assert int(left[-1].sum()) < int(inputs["attention_mask"].sum())
    longer = lengthened(inputs, tokens[:, :NEW])
    new = torch.ones(len(tokens), NEW, dtype=torch.bool)
    with (
        torch.inference_mode(),
        hidden_keys(family_of(model.config).decoder(model).layers, [torch.cat([keys, new], 1) for keys in left]),
    ):
        stock = model(**longer).logits[:, -NEW - 1 :]
    torch.testing.assert_close(logits, stock, rtol=0, atol=1e-5)


@pytest.mark.parametrize("drop", ["random at layer 1", "fastv", "fastv per image"])
def test_a_batch_of_different_images_is_its_prompts_one_by_one(small, drop):
    model, inputs, singles = small
    with DROPS[drop](model) as trace:
        tokens, logits = answered(model, inputs)
        together = trace.drain()
        for row, single in enumerate(singles):
            own_tokens, own_logits = answered(model, single)
            assert torch.equal(own_tokens[0], tokens[row])
            torch.testing.assert_close(own_logits[0], logits[row], rtol=0, atol=1e-5)
            (alone,) = trace.drain()
            assert alone.llm_tokens == together[row].llm_tokens
            assert alone.kv_lengths == together[row].kv_lengths
