"""The memory-limited regime on a CPU: same answers, and exactly the bytes that must be streamed."""

from __future__ import annotations

import pytest
import torch

import corematching as cm
from corematching.engine.compiled import generate
from corematching.engine.offload import offload, resident_layers

DEPTH, FFN_BYTES = 6, 3 * 32 * 48 * 4


@pytest.mark.parametrize(
    ("name", "parameters"), [("dense", {}), ("core_neurons", {}), ("corematching", {}), ("fastv", {"keep": 9})]
)
@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_answers_are_those_of_the_resident_model(name, parameters, engine, random_llava, prompts):
    method = cm.build_method(name, **parameters)
    with method(random_llava):
        resident = generate(random_llava, prompts[0], 6)
    with offload(random_llava, 2), method(random_llava):
        assert torch.equal(generate(random_llava, prompts[0], 6, engine), resident)


def test_dense_streams_every_token_and_core_neurons_only_in_prefill(random_llava, prompts):
    streamed = DEPTH - 2
    with offload(random_llava, 2) as traffic:
        with cm.build_method("dense")(random_llava):
            generate(random_llava, prompts[0], 5)
        # Prefill and four steps; after the last layer of a step the next step's first FFN is fetched already.
        assert traffic.copies == 5 * streamed + 1
        assert traffic.bytes == traffic.copies * FFN_BYTES
    with offload(random_llava, 2) as traffic:
        with cm.build_method("core_neurons", keep=0.5)(random_llava):
            generate(random_llava, prompts[0], 5)
        assert traffic.copies == streamed


def test_weights_come_back_bit_for_bit(random_llava, prompts):
    before = {name: value.clone() for name, value in random_llava.state_dict().items()}
    logits = random_llava(**prompts[0]).logits
    with offload(random_llava, 0) as traffic, torch.no_grad():
        assert torch.equal(random_llava(**prompts[0]).logits, logits)
    assert traffic.copies == DEPTH
    after = random_llava.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(random_llava(**prompts[0]).logits, logits)


def test_reading_a_streamed_weight_unannounced_cannot_look_right(random_llava):
    with offload(random_llava, 5):
        weight = random_llava.model.language_model.layers[5].mlp.gate_proj.weight
        assert weight.isnan().all()
        assert weight.untyped_storage().nbytes() == weight.element_size()


def test_a_device_smaller_than_the_model_holds_no_byte_too_many(random_llava, prompts):
    tensors = [*random_llava.parameters(), *random_llava.buffers()]
    before, whole = [tensor.clone() for tensor in tensors], sum(t.numel() * t.element_size() for t in tensors)
    expected = generate(random_llava, prompts[0], 5)
    budget = whole - 2 * FFN_BYTES  # four FFNs stay on the host, two staging buffers take their place
    with offload(random_llava, 2, device="cpu", budget=budget) as traffic:
        assert traffic.placed == budget
        with cm.build_method("dense")(random_llava):
            assert torch.equal(generate(random_llava, prompts[0], 5), expected)
    with (
        pytest.raises(cm.UserError, match="memory budget too small"),
        offload(random_llava, 2, device="cpu", budget=budget - 1),
    ):
        pytest.fail("placed more than allowed")
    assert all(map(torch.equal, tensors, before))


def test_interleaved_answers_are_refused_rather_than_mixed_up(random_llava, prompts):
    with offload(random_llava, 0), cm.build_method("core_neurons")(random_llava), torch.inference_mode():
        first = random_llava(**prompts[0], use_cache=True)
        random_llava(**prompts[1], use_cache=True)
        with pytest.raises(RuntimeError, match="finish one answer"):
            random_llava(input_ids=torch.tensor([[5]]), past_key_values=first.past_key_values)


def test_plan_fills_the_budget_and_not_more():
    ffn, depth = 10.0, 8
    assert resident_layers(80, ffn, depth) == depth
    for share in (0.0, 0.4):
        for room in (60, 65, 79):
            whole = resident_layers(room, ffn, depth, share)
            used = [(n + 2 + (depth - n) * share) * ffn for n in (whole, whole + 1)]
            assert used[0] <= room < used[1] or whole == depth - 1
    with pytest.raises(cm.UserError, match="memory budget too small"):
        resident_layers(15, ffn, depth)
