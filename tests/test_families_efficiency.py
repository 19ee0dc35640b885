"""The timing road runs every family: eager and static decoding give the tokens of ``generate``."""

from __future__ import annotations

import pytest
import torch
from masked import answered
from small_families import SMALL_FAMILIES, small_family

import corematching as cm
from corematching.efficiency.inputs import fixed_inputs
from corematching.efficiency.latency import in_turns
from corematching.engine.compiled import ENGINES, generate

METHODS = {
    "dense": cm.build_method("dense"),
    "fastv": cm.build_method("fastv", keep=0.5, layer=2),
    "corematching": cm.build_method("corematching", layer=2),
}
STEPS = 4


@pytest.fixture(scope="module", params=SMALL_FAMILIES)
def small(request):
    model = small_family(request.param)[0]
    return model, fixed_inputs(model, before=5, after=6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", METHODS)
def test_timed_answers_are_those_of_generate(small, method, engine):
    model, inputs = small
    with METHODS[method](model), torch.inference_mode():
        tokens, _ = answered(model, inputs, STEPS)
        assert generate(model, inputs, STEPS, engine).tolist() == tokens.tolist()


def test_a_method_is_timed_beside_dense(small):
    model, inputs = small
    pair = in_turns(model, METHODS["dense"], METHODS["fastv"], inputs, [1, 3], 1, "compiled")
    assert len(pair.method) == len(pair.dense) >= 1
    dense, own = pair.dense[0].trace, pair.method[0].trace
    assert dense.generated_tokens == own.generated_tokens == 3
    assert own.kv_bytes < dense.kv_bytes
    assert cm.flops(model.config, own).prefill < cm.flops(model.config, dense).prefill
