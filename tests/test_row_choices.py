"""The decode-time KV stage: really fewer rows, what the trace and the cost say of them, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from conftest import left_pad, make_prompt
from torch.utils.flop_counter import FlopCounterMode

import corematching as cm
from corematching.cost.roofline import at_depth, decode_bytes
from corematching.efficiency.inputs import fixed_inputs
from corematching.efficiency.latency import in_turns
from corematching.engine.rows import gather_rows
from corematching.engine.trace import SampleTrace
from corematching.evaluation.trace_summary import acted
from corematching.methods.base import ChooseRows, Method, ReadRows
from corematching.methods.measured import Measured

DEPTH, HEADS = 6, 2


@dataclass(frozen=True)
class Reads(Method):
    """Reads what a function of the view says, and shows what it saw."""

    choose: Callable
    layers: tuple[int, ...] = tuple(range(DEPTH))
    seen: list = field(default_factory=list, compare=False)
    acts_on: ClassVar[frozenset[str]] = frozenset({"kv"})

    def stages(self, geometry):
        return [ChooseRows(layer, self.noting, self.begin, unrotated=True) for layer in self.layers]

    def begin(self, view):
        self.seen.append(("begin", view.layer, view.rows, view.length, view.question_length, view.visual_mask))

    def noting(self, view):
        self.seen.append(("step", view.layer, view.step, view.rows))
        return self.choose(view)


def every_second(view):
    """Even rows for the first KV head, odd ones for the second, and the own row."""
    half = (view.rows - 1) // 2
    index = torch.stack([2 * torch.arange(half), 2 * torch.arange(half) + 1])
    return ReadRows(torch.cat([index, torch.full((HEADS, 1), view.rows - 1)], 1))


def ragged(view):
    return ReadRows([torch.arange(view.rows - 9, view.rows), torch.arange(view.rows - 4, view.rows)])


def greedy(model, inputs, **kwargs):
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **kwargs}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def step_logits(model, method, prompt, token=7):
    with method(model):
        cache = model(**prompt, use_cache=True).past_key_values
        return model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits


def masked_reference(model, prompt, rows_of_head, token=7):
    """A decode step of the stock model whose query heads see only the rows of their KV head, by an additive mask."""
    cache = model(**prompt, use_cache=True).past_key_values
    n = prompt["input_ids"].shape[1] + 1
    mask = torch.full((1, 2 * HEADS, 1, n), torch.finfo(torch.float32).min)
    for head, rows in enumerate(rows_of_head):
        mask[:, 2 * head : 2 * head + 2, :, rows] = 0
    embeds = model.get_input_embeddings()(torch.tensor([[token]]))
    decoder, hidden = model.model.language_model, embeds
    positions = torch.tensor([[n - 1]])
    rope = decoder.rotary_emb(hidden, position_ids=positions)
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        for layer in decoder.layers:
            hidden = layer(
                hidden, attention_mask=mask, position_embeddings=rope, position_ids=positions, past_key_values=cache
            )
    finally:
        model.set_attn_implementation(kernel)
    return model.lm_head(decoder.norm(hidden))


@torch.no_grad()
def test_reading_nothing_less_is_the_stock_model_bit_for_bit(random_llava, prompts):
    batch = left_pad(prompts)
    dense = greedy(random_llava, batch, output_logits=True, return_dict_in_generate=False)
    with Reads(lambda view: None)(random_llava) as trace:
        assert torch.equal(greedy(random_llava, batch), dense)
    for sample in trace.samples:
        held = [[sample.rows_held(layer, step) for step in range(5)] for layer in range(DEPTH)]
        assert sample.rows_read == held
        assert not acted(sample)
    with cm.build_method("dense")(random_llava) as plain:
        greedy(random_llava, batch)
    assert plain.samples[0].rows_read == []
    config = random_llava.config
    assert cm.flops(config, trace).as_dict() == pytest.approx(cm.flops(config, plain).as_dict())
    assert decode_bytes(config, trace.samples[1], 4, 5) == decode_bytes(config, plain.samples[1], 4, 5)


@torch.no_grad()
@pytest.mark.parametrize("choose", [every_second, ragged])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_reading_rows_equals_masking_the_others(choose, kernel, random_llava):
    prompt = make_prompt(3)
    n = prompt["input_ids"].shape[1] + 1
    index = choose(type("View", (), {"rows": n})).index
    expected = masked_reference(random_llava, prompt, index)
    before = random_llava.config._attn_implementation
    random_llava.set_attn_implementation(kernel)
    try:
        found = step_logits(random_llava, Reads(choose), prompt)
    finally:
        random_llava.set_attn_implementation(before)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("choose", [every_second, ragged])
def test_batches_and_beams_are_asked_about_one_by_one(choose, random_llava, prompts):
    method = Reads(choose)
    with method(random_llava) as trace:
        together, batch = greedy(random_llava, left_pad(prompts)), trace.drain()
        alone = torch.cat([greedy(random_llava, prompt) for prompt in prompts])
        single = trace.drain()
        assert torch.equal(together, alone)
        assert [sample.rows_read for sample in batch] == [sample.rows_read for sample in single]
        beams = greedy(random_llava, left_pad(prompts[:2]), num_beams=2)
        assert torch.equal(beams, torch.cat([greedy(random_llava, own, num_beams=2) for own in prompts[:2]]))


@torch.no_grad()
def test_views_show_one_sample_without_padding(random_llava, prompts):
    method = Reads(lambda view: None, layers=(1, 4))
    with method(random_llava):
        greedy(random_llava, left_pad(prompts), max_new_tokens=3)
    lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    begun = [entry for entry in method.seen if entry[0] == "begin"]
    assert [entry[1:5] for entry in begun] == [
        (layer, own, own, question) for layer in (1, 4) for own, question in zip(lengths, (5, 17, 9), strict=True)
    ]
    for entry, prompt in zip(begun, prompts * 2, strict=True):
        assert torch.equal(entry[5], prompt["input_ids"][0] == 99)
    steps = [entry[1:] for entry in method.seen if entry[0] == "step"]
    assert steps == [(layer, step, own + step + 1) for step in range(2) for layer in (1, 4) for own in lengths]


@torch.no_grad()
def test_signals_are_those_of_the_layer(random_llava):
    prompt, seen = make_prompt(5), {}

    def look(view):
        seen[view.layer] = (view.attention()[:, None], view.unrotated_query, view.query, view.keys_of(1).clone())

    def begin(view):
        seen["prompt", view.layer] = view.attention(3), view.queries(2), view.unrotated_queries(2)

    class Looks(Reads):
        def stages(self, geometry):
            return [ChooseRows(layer, look, begin, unrotated=True) for layer in range(1, DEPTH)]

    with Looks(look)(random_llava):
        cache = random_llava(**prompt, use_cache=True).past_key_values
        random_llava(input_ids=torch.tensor([[7]]), past_key_values=cache)
        keys = cache.layers[1].keys[0]
    kernel = random_llava.config._attn_implementation
    random_llava.set_attn_implementation("eager")
    try:
        first = random_llava(**prompt, use_cache=True, output_attentions=True)
        second = random_llava(
            input_ids=torch.tensor([[7]]), past_key_values=first.past_key_values, output_attentions=True
        )
    finally:
        random_llava.set_attn_implementation(kernel)
    for layer in range(1, DEPTH):
        attention, unrotated, query, shared = seen[layer]
        torch.testing.assert_close(attention, second.attentions[layer][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(unrotated.norm(dim=1), query.norm(dim=1))
        assert torch.equal(shared, keys)
        rows, queries, plain = seen["prompt", layer]
        torch.testing.assert_close(rows, first.attentions[layer][0, :, -3:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(queries.norm(dim=2), plain.norm(dim=2))


@torch.no_grad()
def test_flops_are_those_that_run_and_choosing_is_booked(random_llava):
    prompt = make_prompt(4)

    def choose(view):
        view.spend(100.0, read=8.0)
        return every_second(view)

    with Reads(choose)(random_llava) as trace:
        cache = random_llava(**prompt, use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            random_llava(input_ids=torch.tensor([[7]]), past_key_values=cache)
    (sample,) = trace.samples
    cost = cm.flops(random_llava.config, sample)
    assert cost.decode == counter.get_total_flops() - 2 * 32 * 100
    n = prompt["input_ids"].shape[1] + 1
    assert sample.rows_read == [[(n - 1) // 2 + 1]] * DEPTH
    assert sample.choice_flops == [100.0 * DEPTH]
    assert sample.choice_bytes == [8.0 * DEPTH]
    assert sample.overhead_flops == cost.overhead == 100.0 * DEPTH
    dense = SampleTrace(**{**vars(sample), "rows_read": [], "choice_bytes": [], "choice_flops": []})
    row = sample.dense_kv_bytes / sample.prompt_tokens / DEPTH
    saved = decode_bytes(random_llava.config, dense, 4, 1) - decode_bytes(random_llava.config, sample, 4, 1)
    assert saved == pytest.approx(DEPTH * (row * (n - sample.rows_read[0][0]) - 8.0))
    config, longer = at_depth(random_llava.config, sample, 12)
    assert len(longer.rows_read) == 12
    assert longer.choosing(1) == (1200.0, 96.0)
    assert cm.flops(config, longer).overhead == 1200.0


@torch.no_grad()
def test_a_shortened_trace_forgets_later_steps(random_llava):
    def choose(view):
        view.spend(10.0 * (view.step + 1))
        return every_second(view) if view.step % 2 else None

    with Reads(choose)(random_llava) as trace:
        greedy(random_llava, make_prompt(4), max_new_tokens=7)
        long = trace.drain()[0]
        greedy(random_llava, make_prompt(4), max_new_tokens=4)
        short = trace.drain()[0]
    cut = long.stopped_after(3)
    assert cut.rows_read == short.rows_read
    assert cut.overhead_flops == short.overhead_flops
    assert cm.flops(random_llava.config, cut).decode == cm.flops(random_llava.config, short).decode


@torch.no_grad()
def test_composes_with_token_and_neuron_methods(random_llava, prompts):
    tokens = cm.compose(cm.build_method("fastv", layer=2, keep=10), Reads(every_second))
    method = cm.compose(tokens, cm.build_method("core_neurons", keep=0.4))
    with method(random_llava) as trace:
        together, batch = greedy(random_llava, left_pad(prompts)), trace.drain()
        alone = torch.cat([greedy(random_llava, prompt) for prompt in prompts])
    assert torch.equal(together, alone)
    for sample in batch:
        assert [read[0] for read in sample.rows_read] == [kv // 2 + 1 for kv in sample.kv_lengths]
        assert sample.kv_lengths[0] > sample.kv_lengths[3]
        assert {len(neurons) for neurons in sample.neurons} == {19}
    with pytest.raises(cm.UserError, match="both reduce kv"):
        cm.compose(cm.build_method("h2o"), Reads(every_second))


@torch.no_grad()
def test_turns_copies_and_failures(random_llava, prompts):
    first, token = make_prompt(1), torch.tensor([[7]])
    second = torch.tensor([[11, 12, 13]])
    whole = torch.cat([first["input_ids"], token, second], 1)
    method = Reads(every_second)

    def remembers(view):
        view.memory["steps"] = view.memory.get("steps", 0) + 1
        method.seen.append(view.memory["steps"])
        return every_second(view)

    with Reads(remembers, layers=(0,))(random_llava) as trace:
        cache = random_llava(**first, use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        one = random_llava(input_ids=token, past_key_values=cache).logits
        assert torch.equal(random_llava(input_ids=token, past_key_values=twin).logits, one)
        assert method.seen == [1, 1]
        with pytest.raises(cm.UserError, match="cannot crop"):
            twin.crop(-1)
        random_llava(input_ids=second, past_key_values=cache)
        random_llava(input_ids=token, past_key_values=cache)
        assert method.seen == [1, 1, 1], "a turn begins anew"
        assert cache.get_seq_length() == whole.shape[1] + 1
    assert [len(sample.choice_flops) for sample in trace.samples] == [1, 1, 1]

    def fails(view):
        view.memory["steps"] = view.memory.get("steps", 0) + 1
        if view.memory["steps"] == 2 and len(method.seen) < 4:
            method.seen.append("failed")
            raise RuntimeError("out of memory")
        return every_second(view)

    with Reads(fails, layers=(3,))(random_llava) as trace:
        cache = random_llava(**first, use_cache=True).past_key_values
        random_llava(input_ids=token, past_key_values=cache)
        with pytest.raises(RuntimeError, match="out of memory"):
            random_llava(input_ids=token, past_key_values=cache)
        again = random_llava(input_ids=token, past_key_values=cache).logits
        fresh = random_llava(**first, use_cache=True).past_key_values
        for _ in range(2):
            expected = random_llava(input_ids=token, past_key_values=fresh).logits
    assert torch.equal(again, expected)
    assert len(trace.samples[0].choice_flops) == 2


@torch.no_grad()
def test_what_is_refused_is_refused_in_one_line(random_llava, prompts):
    prompt = prompts[0]
    with Reads(every_second)(random_llava):
        with pytest.raises(cm.UserError, match=r"^use_cache=False is not supported.*\.?$"):
            greedy(random_llava, prompt, use_cache=False)
        with pytest.raises(cm.UserError, match="speculative decoding is not supported"):
            greedy(random_llava, prompt, prompt_lookup_num_tokens=2)
        cache = random_llava(**left_pad(prompts[:2]), use_cache=True).past_key_values
        with pytest.raises(cm.UserError, match="later turns of a batch"):
            random_llava(input_ids=torch.tensor([[7, 8], [7, 8]]), past_key_values=cache)


def test_the_efficiency_road_takes_eager_steps_and_says_so(random_llava):
    inputs = fixed_inputs(random_llava, before=5, after=5)
    pair = in_turns(random_llava, cm.build_method("dense"), Reads(every_second), inputs, [1, 3], 1, "compiled")
    assert (pair.dense[0].engine, pair.method[0].engine) == ("compiled", "eager")
    assert len(pair.method[0].trace.rows_read[0]) == 2


def test_rows_are_gathered_from_any_layout():
    rows = torch.randn(3, 20, 8)
    index = torch.randint(0, 11, (3, 5))
    expected = torch.stack([own[chosen] for own, chosen in zip(rows, index, strict=True)])
    assert torch.equal(gather_rows(rows, index), expected)
    assert torch.equal(gather_rows(rows[:, :11], index), expected)
    assert torch.equal(gather_rows(rows[:, 4:], index), torch.stack([rows[h, 4:][index[h]] for h in range(3)]))
    assert torch.equal(gather_rows(rows.transpose(0, 1).contiguous().transpose(0, 1), index), expected)


# --------------------------------------------------------------------------------------------------------------- mass
def dense_steps(model, prompt, tokens):
    """Per layer and step: dense attention [H, n] of the decoded tokens."""
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        cache = model(**prompt, use_cache=True).past_key_values
        steps = [
            model(input_ids=token[None, None], past_key_values=cache, output_attentions=True).attentions
            for token in tokens
        ]
    finally:
        model.set_attn_implementation(kernel)
    return [[step[layer][0, :, 0] for step in steps] for layer in range(DEPTH)]


@torch.no_grad()
def test_mass_is_that_of_dense_attention_on_the_rows_read(random_llava, prompts):
    """In layer 0 nothing before it differs from dense; the first step reads what the prompt's choice left."""
    prompt = prompts[1]
    n = prompt["input_ids"].shape[1]
    with Measured(Reads(every_second, layers=(0,)))(random_llava) as trace:
        out = random_llava.generate(**prompt, max_new_tokens=3, do_sample=False, eos_token_id=None)
    (sample,) = trace.samples
    dense = dense_steps(random_llava, prompt, out[0, n:-1])
    for step, attention in enumerate(dense[0]):
        rows = every_second(type("View", (), {"rows": n + step + 1})).index
        share = torch.stack([attention[2 * h : 2 * h + 2, rows[h]].sum(1) for h in range(HEADS)]).mean()
        assert sample.mass_read[0][step] == pytest.approx(float(share), abs=1e-5)
    assert sample.mass_read[1] == [1.0, 1.0]
    assert sample.overhead_flops == 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["streaming_llm", "adakv"])
def test_mass_counts_rows_that_a_prompt_time_choice_dropped(name, random_llava, prompts):
    method = cm.build_method(name, keep=20)
    prompt = prompts[1]
    n = prompt["input_ids"].shape[1]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with method(random_llava):
        plain = random_llava.generate(**left_pad(prompts), **options)
    with Measured(method)(random_llava) as trace:
        assert torch.equal(random_llava.generate(**left_pad(prompts), **options), plain)
        batch = trace.drain()
        out = random_llava.generate(**prompt, **options)
        (sample,) = trace.drain()
    torch.testing.assert_close(torch.tensor(batch[1].mass_read), torch.tensor(sample.mass_read))
    assert all(0 < share < 1 for layer in sample.mass_read for share in layer)
    if name == "streaming_llm":
        dense = dense_steps(random_llava, prompt, out[0, n:-1])[0]
        for step, attention in enumerate(dense):
            rows = [*range(4), *range(n - 16, n + step + 1)]
            assert sample.mass_read[0][step] == pytest.approx(float(attention[:, rows].sum(1).mean()), abs=1e-5)
