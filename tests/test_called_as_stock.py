"""What can be asked of a stock model: the same under a method, or refused in one line; failures leave nothing."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from conftest import left_pad, make_prompt
from torch import nn
from transformers import DynamicCache, StaticCache

import corematching as cm

METHODS = {
    "dense": {},
    "fastv": {"layer": 2, "keep": 10},
    "pyramiddrop": {"layers": [1, 3, 5], "keeps": [0.5, 0.25, 0.125]},
    "visionzip": {"keep": 16},
    "snapkv": {"keep": 20, "window": 6},
    "core_neurons": {"keep": 0.4},
    "corematching": {"keep": 10},
}
OPTIONS = {"do_sample": False, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}


def build(name, **parameters):
    return cm.build_method(name, **{**METHODS.get(name, {}), **parameters})


# --------------------------------------------------------------------------------------------------------- no KV cache
@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_without_a_cache_the_same_answer_is_computed_again_and_again(name, random_llava, prompts):
    batch = left_pad(prompts)
    with build(name)(random_llava) as trace:
        cached = random_llava.generate(**batch, max_new_tokens=4, **OPTIONS)
        once = trace.drain()
        again = random_llava.generate(**batch, max_new_tokens=4, use_cache=False, **OPTIONS)
        recomputed = trace.drain()
    torch.testing.assert_close(torch.cat(again.logits), torch.cat(cached.logits), atol=1e-4, rtol=1e-4)
    assert len(once) == len(recomputed) == 3
    for own, more in zip(once, recomputed, strict=True):
        assert own.generated_tokens == more.generated_tokens == 4
        assert (own.prefills, more.prefills) == (1, 4)
        assert more.computed_tokens == 4 + 3  # 0 + 1 + 2 + 3 tokens behind the prompt, three of them for good
        costs = [cm.flops(random_llava.config, sample) for sample in (own, more)]
        assert costs[1].prefill == 4 * costs[0].prefill


# ------------------------------------------------------------------------------------------------ speculative decoding
@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_speculation_answers_the_same_and_what_it_rejects_is_not_generated(name, random_llava):
    prompt = make_prompt(3, text=20)
    prompt["input_ids"][0, -20:] = torch.tensor([5, 6, 7, 8]).repeat(5)
    with build(name)(random_llava) as trace:
        plain = random_llava.generate(**prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
        guessed = random_llava.generate(
            **prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, prompt_lookup_num_tokens=3
        )
        slow, fast = trace.samples
        assert torch.equal(plain, guessed)
        assert slow.generated_tokens == fast.generated_tokens == slow.computed_tokens == 12
        assert fast.computed_tokens == 12 + fast.discarded_tokens
        assert fast.discarded_tokens > 0
        assert [len(layer) for layer in fast.visual_tokens] == [len(layer) for layer in slow.visual_tokens]
        costs = [cm.flops(random_llava.config, sample) for sample in (slow, fast)]
        assert costs[1].decode > costs[0].decode
        with pytest.raises(cm.UserError, match="output_hidden_states"):
            random_llava.generate(
                **prompt, prompt_lookup_num_tokens=3, output_hidden_states=True, return_dict_in_generate=True
            )


# -------------------------------------------------------------------------------------------------------------- outputs
@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_hidden_states_and_attentions_come_layer_by_layer(name, random_llava):
    prompt = make_prompt(3)
    kernel = random_llava.config._attn_implementation
    random_llava.set_attn_implementation("eager")
    try:
        stock = random_llava(**prompt, output_hidden_states=True, output_attentions=True)
        with build(name)(random_llava) as trace:
            own = random_llava(**prompt, output_hidden_states=True, output_attentions=True)
            as_tuple = random_llava(**prompt, output_hidden_states=True, return_dict=False)
            random_llava.config.text_config.output_hidden_states = True
            by_config = random_llava(**prompt).hidden_states
    finally:
        random_llava.config.text_config.output_hidden_states = False
        random_llava.set_attn_implementation(kernel)
    lengths = trace.samples[0].llm_tokens
    assert [states.shape[1] for states in own.hidden_states] == [lengths[0], *lengths]
    assert [attention.shape[2] for attention in own.attentions] == lengths
    assert len(by_config) == len(own.hidden_states) == len(as_tuple[2]) == 7
    if len(set(lengths)) == 1 and lengths[0] == 81:
        for mine, right in zip(own.hidden_states + own.attentions, stock.hidden_states + stock.attentions, strict=True):
            assert torch.equal(mine, right)
    if name == "visionzip":
        assert own.image_hidden_states.shape == (16, 32)
        assert own.image_hidden_states.abs().max() > 0
        assert torch.equal(own.image_hidden_states, own.hidden_states[0][0, 5:21])
    else:
        assert torch.equal(own.image_hidden_states, stock.image_hidden_states)


def text_labels(inputs):
    """Every text token but the first is to be predicted."""
    ids = inputs["input_ids"]
    return ids.masked_fill((ids == 99) | (ids == 1) | (inputs["attention_mask"] == 0), -100)


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_labels_follow_the_tokens_that_stay(name, random_llava, prompts):
    batch = left_pad(prompts)
    labels = text_labels(batch)
    stock = random_llava(**batch, labels=labels)
    with build(name)(random_llava):
        own = random_llava(**batch, labels=labels)
        as_tuple = random_llava(**batch, labels=labels, return_dict=False)
        with pytest.raises(cm.UserError, match="logits_to_keep"):
            random_llava(**batch, labels=labels, logits_to_keep=3)
    assert as_tuple[0] == own.loss
    if own.logits.shape == stock.logits.shape:
        assert own.loss == stock.loss
        return
    alone = []
    for prompt in prompts:
        with build(name)(random_llava):
            alone.append(random_llava(**prompt, labels=text_labels(prompt)).loss)
    text = torch.tensor([float((prompt["input_ids"] != 99).sum() - 1) for prompt in prompts])
    torch.testing.assert_close(own.loss, (torch.stack(alone) * text).sum() / text.sum(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_loss_of_a_question_is_that_of_its_own_tokens(random_llava):
    prompt = make_prompt(3)
    ids = prompt["input_ids"]
    labels = ids.clone()
    labels[:, : 5 + 64] = -100
    with build("fastv")(random_llava):
        out = random_llava(**prompt, labels=labels)
    right = torch.nn.functional.cross_entropy(out.logits[0, -13:-1], ids[0, -12:])
    torch.testing.assert_close(out.loss, right)


@torch.no_grad()
def test_positions_of_logits_are_refused_where_tokens_left(random_llava):
    prompt = make_prompt(3)
    places = torch.tensor([3, 80])
    right = random_llava(**prompt, logits_to_keep=places).logits
    with build("core_neurons")(random_llava):
        assert torch.equal(random_llava(**prompt, logits_to_keep=places).logits, right)
    with build("fastv")(random_llava) as trace, pytest.raises(cm.UserError, match="logits_to_keep as positions"):
        random_llava(**prompt, logits_to_keep=places)
    assert trace.samples == []


@torch.no_grad()
@pytest.mark.parametrize("name", ["fastv", "snapkv", "corematching"])
def test_padding_on_the_right_changes_nothing(name, random_llava):
    prompt = make_prompt(3)
    padded = dict(prompt)
    padded["input_ids"] = torch.nn.functional.pad(prompt["input_ids"], (0, 5))
    padded["attention_mask"] = torch.nn.functional.pad(prompt["attention_mask"], (0, 5))
    with build(name)(random_llava) as trace:
        right = random_llava(**prompt).logits[:, -1]
        logits = random_llava(**padded).logits
        one, other = trace.samples
    last = logits[:, -6] if name == "snapkv" else logits[:, -1]  # where nothing left, positions stay
    torch.testing.assert_close(last, right, atol=1e-5, rtol=1e-5)
    assert one.kv_lengths == other.kv_lengths


# ---------------------------------------------------------------------------------------------------- one-line refusals
@torch.no_grad()
def test_caches_and_settings_that_hide_the_prompt_are_refused(random_llava):
    prompt = make_prompt(3)
    embeds = random_llava.get_input_embeddings()(prompt["input_ids"])
    text = random_llava.config.text_config
    offloaded = DynamicCache(config=text)
    offloaded.offloading = True  # as DynamicCache(offloading=True), which needs an accelerator, is
    with build("fastv")(random_llava) as trace:
        for arguments, message in (
            ({"past_key_values": StaticCache(config=text, max_cache_len=99)}, "StaticCache of .*dynamic"),
            ({"past_key_values": offloaded}, "offloaded DynamicCache"),
            ({"past_key_values": ((embeds, embeds),)}, "type tuple"),
            ({"attention_mask": torch.ones(1, 1, 81, 81)}, "2D padding mask"),
        ):
            with pytest.raises(cm.UserError, match=message):
                random_llava(**{**prompt, **arguments})
        with pytest.raises(cm.UserError, match="inputs_embeds"):
            random_llava(inputs_embeds=embeds)
        for arguments, message in (
            ({"cache_implementation": "static"}, "cache_implementation='static'.*dynamic"),
            ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
            ({"prefill_chunk_size": 16}, "prefill_chunk_size"),
            ({"assistant_early_exit": 2}, "assistant_early_exit"),
            ({"use_cache": False, "past_key_values": DynamicCache(config=text)}, "use_cache=False contradicts"),
        ):
            with pytest.raises(cm.UserError, match=message):
                random_llava.generate(**prompt, max_new_tokens=2, **arguments)
        assert trace.samples == []


@torch.no_grad()
def test_prompts_beyond_the_context_are_refused(random_llava):
    config = random_llava.config.text_config
    before, config.max_position_embeddings = config.max_position_embeddings, 90
    try:
        with build("fastv")(random_llava) as trace:
            cache = DynamicCache(config=config)
            first = random_llava.generate(**make_prompt(3), past_key_values=cache, max_new_tokens=2)
            with pytest.raises(cm.UserError, match="93 tokens is longer than the model's context of 90"):
                random_llava.generate(
                    input_ids=torch.cat([first, first[:, -10:]], 1), past_key_values=cache, max_new_tokens=2
                )
            with pytest.raises(cm.UserError, match="109 tokens is longer"):
                random_llava(**make_prompt(3, text=40))
            assert len(trace.samples) == 1
    finally:
        config.max_position_embeddings = before


# ------------------------------------------------------------------------------------------------------------- failures
@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("cached", [False, True])
def test_a_pass_that_failed_leaves_no_trace_and_no_rows(name, cached, random_llava):
    prompt = make_prompt(3)

    def fail(*_):
        raise torch.OutOfMemoryError("simulated")

    def ask(cache, ids=None):
        inputs = prompt if ids is None else {"input_ids": ids}
        return random_llava.generate(**inputs, past_key_values=cache, max_new_tokens=3, **OPTIONS)

    def new_cache():
        return DynamicCache(config=random_llava.config.text_config) if cached else None

    with build(name)(random_llava) as trace:
        clean = ask(new_cache())
        right = trace.drain()[0]
        cache = new_cache()
        for place in (random_llava.model.language_model.layers[4], random_llava.lm_head):
            hook = place.register_forward_pre_hook(fail)
            with pytest.raises(torch.OutOfMemoryError):
                ask(cache)
            hook.remove()
        retried = ask(cache)
        (sample,) = trace.drain()
        assert torch.equal(retried.sequences, clean.sequences)
        assert cm.flops(random_llava.config, sample) == cm.flops(random_llava.config, right)
        if cached:
            ids = torch.cat([clean.sequences, clean.sequences[:, 70:75]], 1)
            twin = copy.deepcopy(cache)
            hook = random_llava.model.language_model.layers[4].register_forward_pre_hook(fail)
            with pytest.raises(torch.OutOfMemoryError):
                ask(cache, ids)
            hook.remove()
            assert torch.equal(ask(cache, ids).logits[0], ask(twin, ids).logits[0])
            assert len(trace.samples) == 2


# ----------------------------------------------------------------------------------------- weights behind their modules
class LowRank(nn.Module):
    """An adapter around a linear layer, as PEFT makes them."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        generator = torch.Generator().manual_seed(base.out_features)
        self.down = nn.Parameter(torch.randn(4, base.in_features, generator=generator) * 0.2)
        self.up = nn.Parameter(torch.randn(base.out_features, 4, generator=generator) * 0.2)
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def delta(self):
        return self.up @ self.down

    def forward(self, x):
        return self.base_layer(x) + x @ self.down.T @ self.up.T


class Added(nn.Module):
    """A parametrisation."""

    def __init__(self, delta):
        super().__init__()
        self.delta = delta

    def forward(self, weight):
        return weight + self.delta


def ffn_linears(model):
    for layer in model.model.language_model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield layer.mlp, name, getattr(layer.mlp, name)


def adapted(model, kind):
    """Two copies: with adapters of some kind on every FFN, and with the same change merged into the weights."""
    own, merged = copy.deepcopy(model), copy.deepcopy(model)
    for (mlp, name, linear), (_, _, plain) in zip(list(ffn_linears(own)), list(ffn_linears(merged)), strict=True):
        adapter = LowRank(linear)
        plain.weight.data += adapter.delta.data
        if kind == "module":
            setattr(mlp, name, adapter)
        elif kind == "parametrisation":
            nn.utils.parametrize.register_parametrization(linear, "weight", Added(adapter.delta.detach()))
        elif kind == "hook":
            linear.register_forward_hook(partial(_added, adapter.delta.detach()))
        else:
            linear.forward = partial(_replaced, linear, adapter.delta.detach())
    return own, merged


def _added(delta, module, args, output):
    return output + args[0] @ delta.T


def _replaced(linear, delta, x):
    return type(linear).forward(linear, x) + x @ delta.T


NEURONS = {
    "core_neurons": {"keep": 0.4},
    "coreinfer": {"keep": 0.3, "token_keep": 0.4},
    "wanda_neurons": {"keep": 0.3},
    "dejavu": {"keep": 0.3},
    "powerinfer": {"keep": 0.3, "hot_fraction": 0.1},
    "corematching": {"keep": 10},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["module", "parametrisation", "hook", "forward"])
@pytest.mark.parametrize("name", NEURONS)
def test_adapters_act_as_if_they_were_merged(name, kind, random_llava, predictor_file):
    parameters = NEURONS[name] | ({"predictor": predictor_file} if name in ("dejavu", "powerinfer") else {})
    method = cm.build_method(name, **parameters)
    results = []
    for model in adapted(random_llava, kind):
        with method(model) as trace:
            out = model.generate(**make_prompt(3), max_new_tokens=3, **OPTIONS)
        results.append((torch.cat(out.logits), trace.samples[0]))
    (own, sample), (merged, right) = results
    torch.testing.assert_close(own, merged, atol=2e-4, rtol=2e-4)
    assert all(map(torch.equal, sample.neurons, right.neurons))
    assert (sample.ffn_mode, right.ffn_mode) == ("whole", "sliced")
    costs = [cm.flops(random_llava.config, entry).decode for entry in (sample, right)]
    assert costs[0] > costs[1], "an FFN that is computed whole costs that much"


@torch.no_grad()
@pytest.mark.parametrize("name", ["fastv", "core_neurons", "wanda_neurons"])
def test_a_peft_model_answers_as_the_merged_one(name, random_llava):
    peft = pytest.importorskip("peft")
    names = r".*language_model.*(gate_proj|up_proj|down_proj|q_proj)"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=names, init_lora_weights=False)
        model = peft.get_peft_model(copy.deepcopy(random_llava), config).eval()
    merged = copy.deepcopy(model).merge_and_unload().eval()
    method = cm.build_method(name, **NEURONS.get(name, {"layer": 2, "keep": 10}))
    results = []
    for own in (model, merged):
        with method(own) as trace:
            out = own.generate(**make_prompt(3), max_new_tokens=3, **OPTIONS)
            results.append((torch.cat(out.logits), own(**make_prompt(4)).logits, trace.samples[0].visual_tokens[-1]))
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right, atol=2e-4, rtol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["fastv", *NEURONS])
def test_offloaded_weights_are_waited_for(name, random_llava, predictor_file):
    accelerate = pytest.importorskip("accelerate")
    parameters = NEURONS.get(name, {"keep": 10}) | (
        {"predictor": predictor_file} if name in ("dejavu", "powerinfer") else {}
    )
    method = cm.build_method(name, **parameters)
    off = copy.deepcopy(random_llava)
    accelerate.cpu_offload(off, execution_device=torch.device("cpu"))
    answers = []
    for model in (random_llava, off):
        with method(model):
            answers.append(torch.cat(model.generate(**make_prompt(3), max_new_tokens=3, **OPTIONS).logits))
    torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-5)


class Shell(nn.Module):
    """Shaped like a PEFT model."""

    def __init__(self, model, prompt_learning=False):
        super().__init__()
        self.base = model
        self.peft_config = {"default": type("Config", (), {"is_prompt_learning": prompt_learning})()}

    def get_base_model(self):
        return self.base


@torch.no_grad()
def test_wrapped_models_are_unwrapped_or_named(random_llava):
    prompt = make_prompt(3)
    with build("fastv")(random_llava):
        right = random_llava(**prompt).logits
    with build("fastv")(Shell(random_llava)) as trace:
        assert torch.equal(random_llava(**prompt).logits, right)
        assert len(trace.samples) == 1
    compiled = type("OptimizedModule", (), {"_orig_mod": random_llava})()
    for model, message in (
        (Shell(random_llava, prompt_learning=True), "Shell puts virtual tokens"),
        (nn.DataParallel(random_llava), "DataParallel wraps a model"),
        (compiled, "OptimizedModule is compiled"),
        ("model", "str is not a transformers model"),
        (None, "NoneType is not a transformers model"),
    ):
        with pytest.raises(cm.UserError, match=message):
            build("fastv")(model).__enter__()


def test_other_ffns_and_sharded_weights_are_refused_when_installing(random_llava):
    class Other(type(random_llava.model.language_model.layers[0].mlp)):
        def forward(self, x):
            return super().forward(x) + x

    model = copy.deepcopy(random_llava)
    model.model.language_model.layers[2].mlp.__class__ = Other
    with pytest.raises(cm.UserError, match=r"layer 2 \(Other\) computes something of its own"):
        build("core_neurons")(model).__enter__()
    with build("fastv")(model):
        pass
    model = copy.deepcopy(random_llava)
    model.model.language_model.layers[3].self_attn.q_proj.weight.placements = ("Shard(0)",)
    for name in ("fastv", "core_neurons"):
        with pytest.raises(cm.UserError, match=r"layers.3.self_attn.q_proj.weight is sharded"):
            build(name)(model).__enter__()
    with build("dense")(model):
        pass
