"""The engine: real dropping, honest traces, clean removal, batches, beams."""

from __future__ import annotations

import pytest
import torch
from conftest import IMAGE_TOKENS, left_pad, make_prompt

import corematching as cm

BUDGETED = {
    "dense": {},
    "random": {"keep": 10},
    "uniform": {"keep": 10},
    "fastv": {"keep": 10},
    "core_tokens": {},
    "core_neurons": {},
    "corematching": {},
    "corematching_release": {"first_layer": 2, "last_layer": 4},
}
EVERYTHING = {
    "dense": {},
    "random": {"keep": 1.0},
    "uniform": {"keep": 1.0},
    "fastv": {"keep": 1.0},
    "core_tokens": {"threshold": "keep", "keep": 1.0},
    "core_neurons": {"keep": 1.0},
    "corematching": {"threshold": "keep", "keep": 1.0, "beta": 1.0},
}


def greedy(model, inputs, **kwargs):
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **kwargs}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def fingerprint(model):
    """Attributes and hooks of every module."""
    return {
        path: (set(vars(module)), list(module._forward_pre_hooks), list(module._forward_hooks))
        for path, module in model.named_modules()
    }


@torch.no_grad()
@pytest.mark.parametrize("name", EVERYTHING)
def test_keeping_everything_is_dense_bit_for_bit(name, random_llava, prompts):
    batch = left_pad(prompts)
    dense = random_llava(**batch).logits
    dense_ids = greedy(random_llava, batch)
    with cm.build_method(name, **EVERYTHING[name])(random_llava) as trace:
        assert torch.equal(random_llava(**batch).logits, dense)
        assert torch.equal(greedy(random_llava, batch), dense_ids)
    assert trace.samples[0].average_visual_tokens == IMAGE_TOKENS


@torch.no_grad()
@pytest.mark.parametrize("name", BUDGETED)
def test_model_is_untouched_after_the_context(name, random_llava, prompts):
    before = random_llava(**prompts[0]).logits
    greedy(random_llava, prompts[0])  # transformers installs hooks of its own on first use
    modules = fingerprint(random_llava)
    with cm.build_method(name, **BUDGETED[name])(random_llava):
        greedy(random_llava, prompts[0])
    assert torch.equal(random_llava(**prompts[0]).logits, before)
    assert fingerprint(random_llava) == modules


@torch.no_grad()
@pytest.mark.parametrize("name", BUDGETED)
def test_batch_answers_like_one_by_one(name, random_llava, prompts):
    with cm.build_method(name, **BUDGETED[name])(random_llava) as trace:
        together = greedy(random_llava, left_pad(prompts))
        batch = trace.drain()
        for row, prompt in enumerate(prompts):
            assert torch.equal(greedy(random_llava, prompt)[0], together[row]), f"sample {row}"
            (alone,) = trace.drain()
            for layer in range(6):
                assert torch.equal(alone.visual_tokens[layer], batch[row].visual_tokens[layer])
            assert alone.kv_lengths == batch[row].kv_lengths


@torch.no_grad()
@pytest.mark.parametrize("name", BUDGETED)
def test_trace_tells_the_cache_lengths(name, random_llava):
    prompt = make_prompt(5)
    with cm.build_method(name, **BUDGETED[name])(random_llava) as trace:
        cache = random_llava(**prompt, use_cache=True).past_key_values
    sample = trace.samples[0]
    assert [layer.keys.shape[2] for layer in cache.layers] == sample.kv_lengths
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert stored == sample.kv_bytes


@torch.no_grad()
@pytest.mark.parametrize("name", ["core_tokens", "corematching"])
def test_core_tokens_adapt_unless_a_budget_is_given(name, random_llava):
    prompt = make_prompt(6)

    def kept(**parameters):
        with cm.build_method(name, **parameters)(random_llava) as trace:
            random_llava(**prompt)
        return len(trace.samples[0].visual_tokens[-1])

    assert kept(keep=9) == kept(threshold="keep", keep=9) == 9
    assert kept() not in (9, IMAGE_TOKENS)


@torch.no_grad()
def test_tokens_leave_where_the_method_says(random_llava):
    prompt = make_prompt(6)
    with cm.build_method("fastv", layer=3, keep=7)(random_llava) as trace:
        random_llava(**prompt)
    sample = trace.samples[0]
    assert [len(layer) for layer in sample.visual_tokens] == [64, 64, 64, 7, 7, 7]
    assert sample.llm_tokens == [81, 81, 81, 24, 24, 24]
    assert (sample.visual_tokens[3].diff() > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["random", "fastv", "corematching"])
def test_beam_search_and_sampling_run(name, random_llava, prompts):
    batch = left_pad(prompts[:2])
    with cm.build_method(name, **BUDGETED[name])(random_llava) as trace:
        beams = greedy(random_llava, batch, num_beams=3)
        torch.manual_seed(1)
        sampled = greedy(random_llava, batch, do_sample=True, temperature=0.7)
        single = torch.cat([greedy(random_llava, prompt, num_beams=3) for prompt in prompts[:2]])
    assert beams.shape == sampled.shape == (2, 6)
    assert torch.equal(beams, single)
    assert trace.samples


@torch.no_grad()
def test_masked_batch_computes_what_slicing_computes(random_llava, prompts):
    with cm.build_method("core_neurons", keep=0.3)(random_llava) as trace:
        greedy(random_llava, left_pad(prompts))
        modes = {sample.ffn_mode for sample in trace.drain()}
        greedy(random_llava, prompts[0])
        (alone,) = trace.drain()
    assert modes == {"masked"}
    assert alone.ffn_mode == "sliced"
    assert [len(neurons) for neurons in alone.neurons] == [14] * 6


@torch.no_grad()
def test_text_only_prompts_pass_through(random_llava):
    ids = torch.arange(3, 20)[None]
    dense = random_llava(input_ids=ids).logits
    with cm.build_method("fastv", keep=4)(random_llava) as trace:
        assert torch.equal(random_llava(input_ids=ids).logits, dense)
    assert trace.samples[0].image_tokens == 0


@torch.no_grad()
def test_random_control_changes_with_its_seed_and_with_the_question(random_llava):
    def kept(seed, question):
        with cm.build_method("random", keep=8, seed=seed)(random_llava) as trace:
            random_llava(**make_prompt(question))
        return trace.samples[0].visual_tokens[0].tolist()

    assert kept(0, 1) == kept(0, 1)
    assert kept(0, 1) != kept(1, 1)
    assert kept(0, 1) != kept(0, 2)


def test_one_method_at_a_time(random_llava):
    with cm.build_method("dense")(random_llava), pytest.raises(cm.UserError, match="compose"):
        cm.build_method("fastv")(random_llava).__enter__()


def test_static_caches_are_refused_in_one_line(random_llava, prompts):
    with cm.build_method("dense")(random_llava), pytest.raises(cm.UserError, match="dynamic"):
        greedy(random_llava, prompts[0], cache_implementation="static")


@torch.no_grad()
def test_composition_prunes_tokens_and_neurons(random_llava, prompts):
    method = cm.compose(cm.build_method("fastv", keep=9), cm.build_method("core_neurons", keep=0.25))
    with method(random_llava) as trace:
        greedy(random_llava, prompts[0])
    sample = trace.samples[0]
    assert len(sample.visual_tokens[-1]) == 9
    assert {len(neurons) for neurons in sample.neurons} == {12}


def test_illegal_composition_names_the_reason():
    with pytest.raises(cm.UserError, match="both reduce tokens"):
        cm.compose(cm.build_method("fastv"), cm.build_method("random"))


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("nonsense", {}, r"unknown method 'nonsense'.*fastv"),
        ("fastv", {"kep": 3}, r"unknown parameter 'kep'.*keep"),
        ("fastv", {"keep": 0}, r"keep=0 "),
        ("fastv", {"keep": -3}, r"keep=-3 "),
        ("fastv", {"keep": 1.5}, r"keep=1.5 "),
        ("fastv", {"keep": "many"}, r"keep='many' "),
        ("core_neurons", {"keep": 0.0}, r"keep=0.0 "),
        ("core_tokens", {"score": "magic"}, r"score='magic'.*cosine"),
        ("corematching", {"tokens": False, "neurons": False}, r"leave nothing to do"),
    ],
)
def test_bad_parameters_are_named(name, parameters, message):
    with pytest.raises(cm.UserError, match=message):
        cm.build_method(name, **parameters)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("fastv", {"keep": 65}, r"keep=65.*64"),
        ("fastv", {"layer": 6, "keep": 9}, r"layer=6.*1 to 5"),
        ("random", {"layer": -2, "keep": 9}, r"layer=-2"),
        ("core_neurons", {"layers": [2, 9]}, r"layers=\[2, 9\]"),
    ],
)
def test_parameters_that_do_not_fit_the_model_are_named(name, parameters, message, random_llava):
    with pytest.raises(cm.UserError, match=message), cm.build_method(name, **parameters)(random_llava):
        pass
