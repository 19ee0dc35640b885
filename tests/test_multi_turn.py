"""Several turns on one KV cache: only new tokens run, at their own positions, over whatever rows each layer kept."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from conftest import IMAGE_TOKEN, IMAGE_TOKENS, left_pad, make_prompt
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import corematching as cm

DEPTH = 6
METHODS = {
    "dense": {},
    "random": {"keep": 10},
    "fastv": {"layer": 2, "keep": 10},
    "pyramiddrop": {"layers": [1, 3, 5], "keeps": [0.5, 0.25, 0.125]},
    "sparsevlm": {"schedule": [30, 20, 8], "layers": [0, 2, 4]},
    "topv": {"layer": 1, "keep": 12},
    "dart": {"layer": 2, "keep": 16, "image_pivots": 2, "text_pivots": 2},
    "pooling": {"keep": 16},
    "visionzip": {"keep": 16},
    "prumerge": {},
    "tome": {"r": 8},
    "divprune": {"keep": 0.32},
    "streaming_llm": {"keep": 20},
    "h2o": {"keep": 20, "recent": 6},
    "snapkv": {"keep": 20, "window": 6},
    "csp": {"keep": 20, "recent": 6},
    "core_neurons": {"keep": 0.4},
    "corematching": {"keep": 10},
    "corematching_release": {"first_layer": 2, "last_layer": 4},
}


def build(name):
    if name == "visionzip+snapkv+core_neurons":
        first = cm.compose(cm.build_method("visionzip", keep=16), cm.build_method("snapkv", keep=20, window=6))
        return cm.compose(first, cm.build_method("core_neurons", keep=0.5))
    return cm.build_method(name, **METHODS[name])


ALL = [*METHODS, "visionzip+snapkv+core_neurons"]
OPTIONS = {"do_sample": False, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}


def first_turn(model, prompt, tokens=4):
    """A fresh cache with one answered prompt on it, and the conversation so far."""
    cache = DynamicCache(config=model.config.text_config)
    out = model.generate(**prompt, past_key_values=cache, max_new_tokens=tokens, **OPTIONS)
    return cache, out.sequences


def question(seed, length=9):
    return torch.randint(3, 99, (1, length), generator=torch.Generator().manual_seed(seed))


def fed_tokens(model):
    """How many tokens the decoder was given, pass by pass."""
    fed = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    return fed, hook


def reference(model, cache, ids, positions):
    """New tokens at explicit positions over the rows a cache holds: attention written out, FFNs dense.

    ``positions`` come as the layer counts them (long [n]).
    """
    decoder = model.model.language_model
    hidden = model.get_input_embeddings()(ids)
    n = ids.shape[1]
    for layer, own in zip(decoder.layers, cache.layers, strict=True):
        attn, normed = layer.self_attn, layer.input_layernorm(hidden)
        cos, sin = decoder.rotary_emb(hidden, position_ids=positions[None])

        def heads(linear, attn=attn, normed=normed):
            return linear(normed).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)

        def rotated(states, cos=cos, sin=sin):
            first, second = states.chunk(2, -1)
            return states * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

        keys = torch.cat([own.keys, rotated(heads(attn.k_proj))], 2).repeat_interleave(attn.num_key_value_groups, 1)
        values = torch.cat([own.values, heads(attn.v_proj)], 2).repeat_interleave(attn.num_key_value_groups, 1)
        logits = rotated(heads(attn.q_proj)) @ keys.transpose(2, 3) * attn.scaling
        future = torch.arange(keys.shape[2]) > torch.arange(n)[:, None] + keys.shape[2] - n
        attended = logits.masked_fill(future, -torch.inf).softmax(-1) @ values
        hidden = hidden + attn.o_proj(attended.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(decoder.norm(hidden))


RENUMBERED = ("pyramiddrop", "sparsevlm", "pooling", "visionzip", "prumerge", "tome", "divprune", ALL[-1])


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_a_second_question_runs_alone_over_the_rows_that_stayed(name, random_llava):
    prompt, new = make_prompt(3), question(1)
    with build(name)(random_llava) as trace:
        cache, first = first_turn(random_llava, prompt)
        ids = torch.cat([first, new], 1)
        n = new.shape[1] + 1  # the answer's last token has not run yet
        assert cache.get_seq_length() == ids.shape[1] - n
        rows = [layer.keys.shape[2] for layer in cache.layers]
        twin = copy.deepcopy(cache)
        positions = torch.arange(ids.shape[1] - n, ids.shape[1])
        if name not in RENUMBERED:
            right = reference(random_llava, twin, ids[:, -n:], positions)[:, -1]
        fed, hook = fed_tokens(random_llava)
        out = random_llava.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=2, **OPTIONS
        )
        hook.remove()
        explicit = random_llava(
            input_ids=ids[:, -n:], position_ids=positions[None], past_key_values=twin, use_cache=True
        ).logits[:, -1]
        first_entry, second, copied = trace.samples
    assert fed == [n, 1]
    torch.testing.assert_close(out.logits[0], explicit, atol=1e-5, rtol=1e-5)
    if name not in RENUMBERED:
        torch.testing.assert_close(out.logits[0], right, atol=1e-4, rtol=1e-4)
    assert (first_entry.prompt_tokens, first_entry.image_tokens, first_entry.generated_tokens) == (81, 64, 4)
    assert (second.prompt_tokens, second.image_tokens, second.images, second.generated_tokens) == (n, 0, 0, 2)
    assert second.past_kv == rows
    assert second.past_tokens == 81 + 3
    assert [layer.keys.shape[2] for layer in cache.layers] == [length + 1 for length in second.kv_lengths]
    assert copied.kv_lengths == second.kv_lengths
    costs = [cm.flops(random_llava.config, entry) for entry in (first_entry, second)]
    assert costs[1].vision == costs[1].projector == 0
    assert 0 < costs[1].prefill < costs[0].prefill


@torch.no_grad()
@pytest.mark.parametrize("name", ["dense", "pyramiddrop", "visionzip", "fastv"])
def test_keeping_everything_answers_as_the_stock_model_in_both_turns(name, random_llava):
    everything = {
        "dense": {},
        "fastv": {"keep": 1.0},
        "visionzip": {"keep": 1.0},
        "pyramiddrop": {"layers": [1, 3], "keeps": [1.0, 1.0]},
    }

    def both_turns():
        cache, first = first_turn(random_llava, make_prompt(3))
        image = make_prompt(9, text=6)
        ids = torch.cat([first, image["input_ids"][:, 1:]], 1)
        out = random_llava.generate(
            input_ids=ids, pixel_values=image["pixel_values"], past_key_values=cache, max_new_tokens=3, **OPTIONS
        )
        return out.sequences, out.logits[0]

    ids, logits = both_turns()
    with cm.build_method(name, **everything[name])(random_llava):
        own_ids, own_logits = both_turns()
    assert torch.equal(own_ids, ids)
    torch.testing.assert_close(own_logits, logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_a_new_image_in_the_second_turn_is_seen_and_reduced_like_the_first(name, random_llava):
    prompt, image = make_prompt(3), make_prompt(9, text=6)
    logits, kept = [], []
    with build(name)(random_llava) as trace:
        for pixels in (image["pixel_values"], torch.randn_like(image["pixel_values"])):
            cache, first = first_turn(random_llava, prompt)
            ids = torch.cat([first, image["input_ids"][:, 1:]], 1)
            out = random_llava.generate(
                input_ids=ids, pixel_values=pixels, past_key_values=cache, max_new_tokens=2, **OPTIONS
            )
            logits.append(out.logits[0])
            before, entry = trace.drain()
            kept.append(entry)
            assert [layer.keys.shape[2] for layer in cache.layers] == [length + 1 for length in entry.kv_lengths]
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    assert (entry.images, entry.image_tokens) == (1, IMAGE_TOKENS)
    if name not in ("corematching", "prumerge"):  # adaptive, or found by what the first turn left
        assert [len(layer) for layer in entry.visual_tokens] == [len(layer) for layer in before.visual_tokens]
    if "tokens" in build(name).acts_on and name != "corematching_release":  # which drops nothing
        assert all(len(sample.visual_tokens[-1]) < IMAGE_TOKENS for sample in kept)
    if "kv" in build(name).acts_on and name != "corematching_release":
        own = [total - past for total, past in zip(entry.kv_lengths, entry.past_kv, strict=True)]
        assert own == before.kv_lengths
    if "neurons" in build(name).acts_on:
        assert all(0 < len(layer) < 48 for layer in entry.neurons)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dense", "fastv", "pyramiddrop", "visionzip", "snapkv", "core_neurons"])
def test_batches_converse_like_single_samples(name, random_llava, prompts):
    """Left padding, different kept numbers, one sample with two images; in turn 2 another has one, padding between."""
    news = [question(4, 7), make_prompt(9, text=4)["input_ids"][:, 1:], question(5, 3)]
    pixels = make_prompt(9, text=4)["pixel_values"]
    with build(name)(random_llava) as trace:
        alone = []
        for prompt, new in zip(prompts, news, strict=True):
            cache, first = first_turn(random_llava, prompt)
            images = {"pixel_values": pixels} if (new == IMAGE_TOKEN).any() else {}
            ids = torch.cat([first, new], 1)
            out = random_llava.generate(input_ids=ids, **images, past_key_values=cache, max_new_tokens=3, **OPTIONS)
            alone.append(out.logits[0])
        single = trace.drain()[1::2]
        batch = left_pad(prompts)
        cache, first = first_turn(random_llava, batch)
        width = max(new.shape[1] for new in news)
        padded = torch.cat([torch.nn.functional.pad(new, (width - new.shape[1], 0)) for new in news])
        shown = torch.stack([torch.arange(width) >= width - new.shape[1] for new in news]).long()
        # Padding now stands between the answers and the new questions.
        out = random_llava.generate(
            input_ids=torch.cat([first, padded], 1),
            pixel_values=pixels,
            attention_mask=torch.cat([batch["attention_mask"], torch.ones(3, 4, dtype=torch.long), shown], 1),
            past_key_values=cache,
            max_new_tokens=3,
            **OPTIONS,
        )
        together, entries = out.logits[0], trace.drain()[-3:]
    for row, own in enumerate(alone):
        torch.testing.assert_close(together[row : row + 1], own, atol=1e-4, rtol=1e-4)
    for own, entry in zip(single, entries, strict=True):
        assert own.kv_lengths == entry.kv_lengths
        assert [len(layer) for layer in own.visual_tokens] == [len(layer) for layer in entry.visual_tokens]


@torch.no_grad()
@pytest.mark.parametrize("name", ["fastv", "visionzip", "snapkv", "corematching"])
def test_beams_converse_too(name, random_llava):
    with build(name)(random_llava) as trace:
        cache, first = first_turn(random_llava, make_prompt(3))
        ids = torch.cat([first, question(1)], 1)
        twin = copy.deepcopy(cache)
        twin.batch_repeat_interleave(2)
        wide = ids.expand(2, -1)
        out = random_llava.generate(
            input_ids=wide, past_key_values=twin, max_new_tokens=3, num_return_sequences=1, **OPTIONS
        )
        alone = random_llava.generate(input_ids=ids, past_key_values=cache, max_new_tokens=3, **OPTIONS)
        assert torch.equal(out.sequences, alone.sequences.expand(2, -1))
        assert len(trace.samples) == 1 + 2 + 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["dense", "fastv", "pyramiddrop", "visionzip", "snapkv", "core_neurons"])
def test_flops_of_every_turn_are_within_a_thousandth_of_torchs_count(name, random_llava):
    prompt, image = make_prompt(3), make_prompt(9, text=6)
    with build(name)(random_llava) as trace:
        cache, first = first_turn(random_llava, prompt)
        trace.drain()
        ids = torch.cat([first, image["input_ids"][:, 1:]], 1)
        with FlopCounterMode(display=False) as counter:
            random_llava.generate(
                input_ids=ids, pixel_values=image["pixel_values"], past_key_values=cache, max_new_tokens=4, **OPTIONS
            )
        turn, counted = cm.flops(random_llava.config, trace.drain()).total, counter.get_total_flops()
        assert turn == pytest.approx(counted, rel=0.001)
        for options in ({"prompt_lookup_num_tokens": 3}, {"use_cache": False}):
            with FlopCounterMode(display=False) as counter:
                random_llava.generate(**prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, **options)
            booked = cm.flops(random_llava.config, trace.drain()).total
            assert booked == pytest.approx(counter.get_total_flops(), rel=0.001), options


@torch.no_grad()
@pytest.mark.parametrize("name", ["dense", "visionzip", "snapkv", "core_neurons"])
def test_decoded_tokens_can_be_cropped_and_rows_reordered(name, random_llava, prompts):
    batch = left_pad(prompts)
    step = torch.tensor([[5], [6], [7]])
    with build(name)(random_llava) as trace:
        cache = random_llava(**batch, use_cache=True).past_key_values
        seen = cache.get_seq_length()

        def decode(ids, cache, order=(0, 1, 2)):
            mask = torch.cat([batch["attention_mask"], torch.ones(3, cache.get_seq_length() + 1 - seen)], 1).long()
            mask = mask[list(order)]
            positions = mask.sum(1, keepdim=True) - 1
            return random_llava(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache
            ).logits[:, -1]

        right = decode(step, cache)
        decode(step, cache)
        cache.crop(-2)
        assert cache.get_seq_length() == seen
        torch.testing.assert_close(decode(step, cache), right, atol=1e-5, rtol=1e-5)
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        moved = decode(step[[2, 0, 1]], cache, (2, 0, 1))
        torch.testing.assert_close(moved, right[[2, 0, 1]], atol=1e-5, rtol=1e-5)
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor([1]))
        positions = batch["attention_mask"][:1].sum(1, keepdim=True)
        alone = random_llava(
            input_ids=step[:1], position_ids=positions, past_key_values=cache, attention_mask=None
        ).logits[:, -1]
        torch.testing.assert_close(alone, right[:1], atol=1e-5, rtol=1e-5)
        sample = trace.samples[0]
        assert (sample.decode_steps, sample.discarded_tokens, sample.generated_tokens) == (5, 4, 2)
        if name in ("visionzip", "snapkv"):
            with pytest.raises(cm.UserError, match="cannot crop 9 tokens from this KV cache: only the 1"):
                cache.crop(-9)


@torch.no_grad()
@pytest.mark.parametrize("name", ["fastv", "visionzip", "snapkv"])
def test_a_shortened_cache_is_refused_outside_its_context(name, random_llava):
    with build(name)(random_llava):
        cache, first = first_turn(random_llava, make_prompt(3))
    step = {"input_ids": first[:, -1:], "past_key_values": cache, "use_cache": True}
    with pytest.raises(cm.UserError, match=f"shortened by method '{name}'"):
        random_llava(**step)
    with cm.build_method("dense")(random_llava), pytest.raises(cm.UserError, match="filled outside"):
        random_llava(**step)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dense", "core_neurons"])
def test_a_whole_cache_may_go_on_without_the_method(name, random_llava):
    prompt = make_prompt(3)
    stock = random_llava(**prompt, use_cache=True).past_key_values
    with build(name)(random_llava):
        cache = random_llava(**prompt, use_cache=True).past_key_values
    step = {"input_ids": question(1), "use_cache": True}
    right = random_llava(**step, past_key_values=stock).logits
    assert torch.equal(random_llava(**step, past_key_values=cache).logits, right)
    assert cache.get_seq_length() == 81 + 9


@torch.no_grad()
def test_a_guide_has_not_read_the_conversation(random_llava, small_guide):
    prompt, image = make_prompt(3), make_prompt(9, text=6)
    with cm.build_method("sgl", guide=small_guide, keep=10)(random_llava) as trace:
        cache, first = first_turn(random_llava, prompt)
        ids = torch.cat([first, question(1)], 1)
        answer = random_llava.generate(input_ids=ids, past_key_values=cache, max_new_tokens=2, **OPTIONS).sequences
        assert [sample.image_tokens for sample in trace.samples] == [64, 0]
        ids = torch.cat([answer, image["input_ids"][:, 1:]], 1)
        with pytest.raises(cm.UserError, match="guide has not read the conversation"):
            random_llava.generate(
                input_ids=ids, pixel_values=image["pixel_values"], past_key_values=cache, max_new_tokens=2, **OPTIONS
            )
        assert len(trace.samples) == 2
        assert cache.get_seq_length() == answer.shape[1] - 1


@torch.no_grad()
def test_nothing_new_is_refused(random_llava):
    with build("visionzip")(random_llava):
        cache, first = first_turn(random_llava, make_prompt(3))
        with pytest.raises(cm.UserError, match="no token beyond the 84"):
            random_llava.generate(input_ids=question(1), past_key_values=cache, max_new_tokens=1)
        new = question(1)
        ids = torch.cat([first, new], 1)
        whole = random_llava.generate(input_ids=ids, past_key_values=copy.deepcopy(cache), max_new_tokens=2, **OPTIONS)
        part = random_llava.generate(
            input_ids=ids[:, 84:],
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=2,
            **OPTIONS,
        )
        assert torch.equal(whole.logits[1], part.logits[1])


@torch.no_grad()
def test_conversations_go_with_their_caches(random_llava):
    with build("fastv")(random_llava):
        cache, _ = first_turn(random_llava, make_prompt(3))
        session = random_llava._corematching
        assert len(session.talks) == 1
        cache.reset()
        assert cache.get_seq_length() == 0
        again = random_llava.generate(**make_prompt(4), past_key_values=cache, max_new_tokens=2, **OPTIONS)
        assert again.past_key_values.get_seq_length() == 81 + 1
        del cache, again
        gc.collect()
        assert len(session.talks) == 0
