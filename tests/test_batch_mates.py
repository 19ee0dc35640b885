"""A sample's trace is its own: whatever else is in the batch, it costs what it costs alone."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from conftest import left_pad, make_prompt

import corematching as cm
from corematching.registry import group_names

# Parameters that fit the six-layer fixture; methods not named run with their defaults.
CASES = {
    "random": {"keep": 10},
    "random before": {"keep": 10, "layer": -1},
    "uniform": {"keep": 10},
    "pooling": {"keep": 0.25},
    "fastv": {"keep": 10},
    "core_tokens attention": {"score": "attention"},
    "core_tokens last": {"score": "last", "keep": 12},
    "corematching_release": {"first_layer": 2, "last_layer": 4},
    "pyramiddrop": {"layers": (1, 2, 4), "keeps": (0.5, 0.25, 0.125)},
    "sparsevlm": {"layers": (1, 2, 4), "schedule": (40, 20, 10)},
    "sparsevlm 2.0": {"version": "2.0", "layers": (1, 2, 4), "schedule": (40, 20, 10), "priority_heads": 2},
    # Two images have more than this; one has not, and is left alone.
    "sparsevlm above one image": {"layers": (1, 2, 4), "schedule": (64, 64, 30)},
    "sparsevlm rank": {"layers": (1, 3), "schedule": "rank"},
    "topv": {"keep": 10},
    "topv above one image": {"keep": 64},
    "dart": {"keep": 20},
    "dart above one image": {"keep": 64},
    "tome": {"r": 8},
    "tome_pre_llm": {"keep": 10},
    "visionzip": {"dominant": 8, "contextual": 2},
    "fastervlm": {"keep": 10},
    "vtc_cls": {"layer": 1, "keep": 10},
    "focusllava": {"layer": 3},
    "as_vit": {"layers": (1, 2), "thresholds": (0.008, 0.016)},
    "divprune": {"keep": 10},
    "cdpruner": {"keep": 9},
    "streaming_llm": {"keep": 0.3},
    "snapkv": {"keep": 40, "window": 8},
    "snapkv above one image": {"keep": 90, "window": 8},
    "h2o above one image": {"keep": 90},
    "csp": {"keep": 20, "recent": 6},
    "csp above one image": {"keep": 90, "recent": 10},
    "sgl": {"keep": 10},
    "sgl exits": {"keep": 10, "early_exit": 1e-30},
    "sgl re-scores": {"keep": 10, "early_exit": 1.0, "consistency_keep": 0.25},
}
CASES |= {name: {} for name in group_names("method") if name not in {case.split()[0] for case in CASES}}
HOW_DECODE_RAN = ("ffn_mode", "masked_steps")
"""What a batch whose samples chose different neurons cannot help: it computes them densely, and says so."""


@pytest.fixture
def build(small_guide, predictor_file, text_model, router_file):
    files = {"sgl": {"guide": small_guide}, "cdpruner": {"text_model": text_model}}
    files |= {"focusllava": {"router": router_file}}
    files |= {name: {"predictor": predictor_file} for name in ("dejavu", "powerinfer")}

    def build(case):
        name = case.split()[0]
        return cm.build_method(name, **CASES[case], **files.get(name, {}))

    return build


@pytest.fixture(scope="module")
def mixed():
    """Prompts of different lengths, one of two images, one of none."""
    text = {key: value for key, value in make_prompt(7, text=30, images=0).items() if key != "pixel_values"}
    return [make_prompt(0, text=5), make_prompt(1, text=17), make_prompt(2, text=9, images=2), text]


def batch_of(prompts):
    none = prompts[0]["pixel_values"][:0]
    return left_pad([{"pixel_values": none, **prompt} for prompt in prompts])


def numbers(trace):
    """Everything a trace holds, as plain values; tensors as lists."""
    held = {field.name: getattr(trace, field.name) for field in fields(trace) if field.name not in HOW_DECODE_RAN}
    held["visual_tokens"] = [layer.tolist() for layer in trace.visual_tokens]
    held["neurons"] = [None if layer is None else layer.tolist() for layer in trace.neurons]
    if trace.guide is not None:
        held["guide"] = {
            "passes": [numbers(run) for run in trace.guide.passes],
            "answered": trace.guide.answered,
            "scoring_flops": trace.guide.scoring_flops,
        }
    return held


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("answer", [True, False])
def test_a_samples_trace_and_flops_do_not_depend_on_its_batch(case, answer, build, readable_llava, mixed):
    model = readable_llava

    def run(inputs):
        if answer:
            model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        else:
            # As generate numbers left-padded prompts.
            model(**inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0))
        return trace.drain()

    with build(case)(model) as trace:
        together = run(batch_of(mixed))
        alone = [sample for prompt in mixed for sample in run(prompt)]
    for ours, own in zip(together, alone, strict=True):
        assert numbers(ours) == numbers(own)
        served_alone = replace(ours, ffn_mode=own.ffn_mode, masked_steps=own.masked_steps)
        assert cm.flops(model.config, served_alone) == cm.flops(model.config, own)


@torch.no_grad()
def test_padding_is_nobodys_overhead(random_llava, mixed):
    """The shortest of three prompts, with mates several times its length."""
    short, long = make_prompt(0, text=2), make_prompt(2, text=60, images=2)
    for method in (cm.build_method("h2o", keep=20), cm.build_method("sparsevlm", **CASES["sparsevlm"])):
        with method(random_llava) as trace:
            random_llava(**short)
            (own,) = trace.drain()
            random_llava(**batch_of([short, long]))
            ours, mate = trace.drain()
        assert ours.overhead_flops == own.overhead_flops > 0
        assert mate.overhead_flops > 1.5 * own.overhead_flops


@torch.no_grad()
def test_a_guides_answer_is_as_long_as_its_own(random_llava, small_guide, mixed):
    """Samples end at different tokens; the longest answer's steps are not the others' cost."""
    guide, _ = cm.load_model(small_guide)
    first = int(guide.generate(**mixed[0], max_new_tokens=1, do_sample=False, suppress_tokens=[99])[0, -1])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": first}
    with cm.build_method("sgl", guide=small_guide, keep=10, early_exit=1e-30)(random_llava) as trace:
        random_llava.generate(**mixed[0], **options)
        (own,) = trace.drain()
        random_llava.generate(**batch_of(mixed[:2]), **options)
        ours, mate = trace.drain()
    assert ours.generated_tokens == own.generated_tokens == 1
    assert mate.generated_tokens > 1
    assert numbers(ours) == numbers(own)
    assert ours.guide.consistency == pytest.approx(own.guide.consistency, rel=1e-4)
