"""Parity with the official FastV and with the published CoreMatching code, on their own numbers."""

from __future__ import annotations

import pytest
import torch
from golden_data import SHIPPED, golden_cases, load_case

import corematching as cm


@pytest.fixture(scope="module")
def model():
    return cm.load_model(str(SHIPPED / "llm" / "model"), dtype="float32")[0]


def inputs_of(tensors):
    ids = tensors["input_ids"]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": tensors["pixel_values"].float(),
    }


def greedy(model, inputs):
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    return out[0, inputs["input_ids"].shape[1] :]


@torch.no_grad()
@pytest.mark.parametrize("case", golden_cases("llm", "fastv"))
def test_fastv(case, model):
    golden, about = load_case("llm", "fastv", case)
    parameters = about["hyper_parameters"]
    method = cm.build_method("fastv", layer=parameters["K"], keep=1 - parameters["R"])
    with method(model) as trace:
        logits = model(**inputs_of(golden)).logits[0, -1]
        ids = greedy(model, inputs_of(golden))
    assert torch.equal(trace.samples[0].visual_tokens[parameters["K"]].long(), golden["kept"])
    assert (logits - golden["logits_last"]).abs().max() < 1e-3
    assert torch.equal(ids, golden["greedy_ids"])


@torch.no_grad()
@pytest.mark.parametrize("case", golden_cases("llm", "corematching_release"))
def test_corematching_release(case, model):
    golden, _ = load_case("llm", "corematching_release", case)
    inputs = inputs_of(golden)
    with cm.build_method("corematching_release")(model) as trace:
        output = model(**inputs, use_cache=True)
        ids = greedy(model, inputs)
    assert (output.logits[0, -1] - golden["logits_last"]).abs().max() < 1e-3
    visual = (inputs["input_ids"][0] == 511).nonzero()[:, 0]
    zeroed = 0
    for layer in range(5, 19):
        rows = output.past_key_values.layers[layer].keys[0].abs().sum((0, 2))[visual]
        assert torch.equal(rows.nonzero()[:, 0], golden[f"kept_layer_{layer}"]), f"layer {layer}"
        zeroed += int((rows == 0).sum())
    assert torch.equal(ids, golden["greedy_ids"])
    assert trace.samples[0].zeroed_kv == zeroed
    assert trace.samples[0].kv_bytes == trace.samples[0].dense_kv_bytes, "the release saves nothing"


@torch.no_grad()
@pytest.mark.parametrize("case", golden_cases("llm", "corematching_drop"))
def test_token_selection_of_the_published_drop_file(case, model):
    """Same co-activation counts, hence the same tokens but for ties (the file breaks them by an unstable top-k)."""
    golden, about = load_case("llm", "corematching_drop", case)
    layer = about["hyper_parameters"]["drop_after_layer_0based"] + 1
    method = cm.build_method("core_tokens", layer=layer, score="last", reference=-5, threshold="keep", keep=0.5)
    with method(model) as trace:
        model(**inputs_of(golden))
    kept = set(trace.samples[0].visual_tokens[layer].tolist())
    counts = golden["counts"].long()
    boundary = counts.sort(descending=True).values[287]
    above = set((counts > boundary).nonzero()[:, 0].tolist())
    tied = set((counts == boundary).nonzero()[:, 0].tolist())
    assert len(kept) == len(golden["kept"]) == 288
    assert above <= kept <= above | tied
    assert above <= set(golden["kept"].tolist()) <= above | tied
