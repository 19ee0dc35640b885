"""Matched budgets: what the planner promises is what the trace then shows."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import corematching as cm
from corematching.errors import UserError
from corematching.evaluation.matching import MATCHED, Shape, matched_parameters
from corematching.registry import method_defaults
from corematching.results.table import build_table

TINY = Shape(tokens=576, layers=12, vision_layers=6)
LARGE = Shape(tokens=576, layers=32, vision_layers=24)
MAPPED = {
    "sparsevlm": {"layers": [1, 2, 6], "priority_heads": 2},
    "pyramiddrop": {"layers": [3, 6, 9]},
    "vtc_cls": {"layer": 4},
}
"""As the tiny model's configuration maps the layers."""
SECOND_MODEL = ("cdpruner", "sgl")
"""Methods that run only with another model."""
COARSE = {"dart": 4.0, "sparsevlm": 2.0}
"""Methods whose counts come in steps: half a step, in tokens per layer."""


@pytest.fixture(scope="module")
def shallow():
    """A random LLaVA of the tiny model's shape (12 decoder and 6 tower layers, 576 visual tokens), 16 wide."""
    width = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "llava",
        vision_config={
            "model_type": "clip_vision_model",
            "num_hidden_layers": 6,
            "image_size": 336,
            "patch_size": 14,
            **width,
        },
        text_config={
            "model_type": "llama",
            "num_hidden_layers": 12,
            "num_key_value_heads": 4,
            "vocab_size": 32,
            **width,
        },
        image_token_id=31,
        image_seq_length=576,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in MATCHED if name not in SECOND_MODEL])
def test_trace_shows_the_promised_average(name, shallow):
    ids = torch.cat([torch.arange(2, 8), torch.full((576,), 31), torch.arange(2, 12)])[None]
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(1))
    for target in (192, 0.5):
        parameters = {**method_defaults(name), **MAPPED.get(name, {})}
        parameters |= matched_parameters(name, parameters, target, TINY)
        with cm.build_method(name, **parameters)(shallow) as trace:
            shallow(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
        wanted = target if target == 192 else 288
        assert trace.samples[0].average_visual_tokens == pytest.approx(wanted, abs=COARSE.get(name, 1.0))


@pytest.mark.parametrize(
    ("name", "average", "expected"),
    [
        ("fastv", 192, {"keep": 166}),  # (32 * 192 - 2 * 576) / 30 = 166.4
        ("random", 64, {"keep": 64}),
        ("cdpruner", 64, {"keep": 64}),
        ("sgl", 288, {"keep": 115}),  # int(0.4 * 32) = 12: (32 * 288 - 12 * 576) / 20 = 115.2
        ("topv", 128, {"keep": 82}),  # three layers see everything: (32 * 128 - 3 * 576) / 29 = 81.7
        ("dart", 192, {"keep": 160}),  # 4 + 20 * 8 = 164 are the nearest to 166
        ("corematching", 192, {"threshold": "keep", "keep": 166}),
    ],
)
def test_counts_by_hand(name, average, expected):
    assert matched_parameters(name, method_defaults(name), average, LARGE) == expected


def test_official_pyramid_average_gives_back_its_halving():
    average = 576 * (1 + 0.5 + 0.25 + 0.125) / 4
    keeps = matched_parameters("pyramiddrop", method_defaults("pyramiddrop"), average / 576, LARGE)["keeps"]
    assert keeps == pytest.approx([288, 144, 72], abs=1)


def test_tower_merges_are_spread_and_capped_at_half():
    assert matched_parameters("tome", {}, 192, TINY)["r"] == [77, 77, 77, 77, 76, 0]
    deep = matched_parameters("tome", {}, 32, TINY)["r"]
    assert sum(deep) == 576 - 32
    left = 576
    for merged in deep[:-1]:
        assert merged <= left // 2
        left -= merged


@pytest.mark.parametrize(
    ("name", "average", "message"),
    [
        ("fastv", 32, r"fastv cannot reach.*32 .*2 of 32 layers.*at least 37"),
        ("pyramiddrop", 100, r"pyramiddrop cannot reach.*100 .*8 of 32"),
    ],
)
def test_an_average_out_of_reach_is_refused(name, average, message):
    with pytest.raises(UserError, match=message):
        matched_parameters(name, method_defaults(name), average, LARGE)
    with pytest.raises(UserError, match="tome cannot reach 4 "):
        matched_parameters("tome", {}, 4, TINY)


def record(method, keep, value, tokens, name=None):
    return {
        "status": "done",
        "labels": {"method": method, "keep": keep, "benchmark": "gqa"},
        "config": {"method": {"name": name or method}},
        "score": {"value": value},
        "trace": {"visual_tokens_per_layer": tokens, "kv_bytes": 1.0, "flops": {"prefill": 1.0}},
    }


def test_ranking_holds_only_methods_with_the_controls_budget():
    records = [
        record("dense", None, 80.0, 576),
        record("random", 192, 60.0, 192.0),
        record("fastv", 192, 72.0, 192.4),
        record("topv", 192, 72.0, 191.0),
        record("unmatched", 192, 79.0, 240.0),
        record("h2o (KV)", 192, 78.0, 576.0, name="h2o"),
    ]
    (line,) = build_table(records, ["gqa"], [], ranked=True).notes
    assert line.endswith("(% of dense): 1. fastv 90.0, 1. topv 90.0, 3. random (control) 75.0")
    assert build_table(records, ["gqa"], []).notes == ()
