"""Prompts about one image share their beginning: same answers, same traces, less work."""

from __future__ import annotations

import pytest
import torch
from conftest import IMAGE_TOKEN, IMAGE_TOKENS, left_pad, make_prompt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_multi_turn import ALL, build

import corematching as cm
from corematching.answering.batches import Asked, plan
from corematching.answering.greedy import decode
from corematching.engine.sharing import Sharing, common_layers, sharing_prompts

TOKENS = 4


def batch_about_two_images():
    """Five prompts of different lengths about two images, their images once, and which prompt shows which."""
    whole = [make_prompt(seed, text=12) for seed in (0, 1)]
    shown = [0, 0, 1, 0, 1]
    prompts = []
    for row, image in enumerate(shown):
        start = whole[image]["input_ids"][:, : 5 + IMAGE_TOKENS]
        own = torch.randint(3, 99, (1, 3 + 2 * row), generator=torch.Generator().manual_seed(50 + row))
        ids = torch.cat([start, own], 1)
        pixels = whole[image]["pixel_values"]
        prompts.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels})
    once = torch.cat([prompt["pixel_values"] for prompt in whole])
    return left_pad(prompts), once, [[image] for image in shown]


def shared(model, method, batch, pixels, images, remember=frozenset(), sharing=None):
    sharing = sharing or Sharing.of(batch["input_ids"], batch["attention_mask"], images, IMAGE_TOKEN, remember)
    inputs = {**batch, "pixel_values": pixels}
    with torch.inference_mode(), method(model) as trace, sharing_prompts(model, sharing):
        ids = decode(model, inputs, TOKENS, ends=[], pad=0)
    return ids, trace.samples


@pytest.mark.parametrize("name", [*ALL, "uniform"])
def test_sharing_changes_neither_answers_nor_traces(name, random_llava):
    batch, pixels, images = batch_about_two_images()
    method = cm.build_method("uniform", keep=9, layer=3) if name == "uniform" else build(name)
    with torch.inference_mode(), method(random_llava) as trace:
        alone = random_llava.generate(**batch, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
    ids, samples = shared(random_llava, method, batch, pixels, images)
    assert torch.equal(ids, alone[:, batch["input_ids"].shape[1] :])
    for own, other in zip(samples, trace.samples, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own.visual_tokens, other.visual_tokens, strict=True))
        assert own.kv_lengths == other.kv_lengths
        assert cm.flops(random_llava.config, own) == cm.flops(random_llava.config, other)


@pytest.mark.parametrize("name", ["dense", "h2o", "core_neurons"])
def test_the_common_beginning_runs_once_per_image(name, random_llava):
    batch, pixels, images = batch_about_two_images()
    seen = []
    hook = random_llava.model.language_model.layers[4].register_forward_pre_hook(
        lambda module, args: seen.append(tuple(args[0].shape[:2]))
    )
    try:
        shared(random_llava, build(name), batch, pixels, images)
    finally:
        hook.remove()
    assert seen[:2] == [(2, 5 + IMAGE_TOKENS), (5, 3 + 2 * 4)]


def test_sharing_ends_where_a_method_drops_by_the_question(random_llava):
    batch, pixels, images = batch_about_two_images()
    rows = []
    layers = random_llava.model.language_model.layers
    hooks = [layer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0]))) for layer in layers[1:3]]
    try:
        shared(random_llava, build("fastv"), batch, pixels, images)
    finally:
        for hook in hooks:
            hook.remove()
    assert rows[:3] == [2, 5, 5]  # layer 1: beginnings, then ends; layer 2: whole rows


def test_methods_of_one_batch_find_what_others_computed(random_llava):
    batch, pixels, images = batch_about_two_images()
    methods = [build(name) for name in ("core_neurons", "dense", "fastv", "visionzip")]
    remember = frozenset(range(6))
    sharing = Sharing.of(batch["input_ids"], batch["attention_mask"], images, IMAGE_TOKEN, remember)
    passes = []
    hook = random_llava.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args: passes.append(args[0].shape[1])
    )
    try:
        together = [shared(random_llava, method, batch, pixels, images, sharing=sharing)[0] for method in methods]
    finally:
        hook.remove()
    alone = [shared(random_llava, method, batch, pixels, images)[0] for method in methods]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    # Layer 0 read the unreduced beginnings once for all three; visionzip's are shorter.
    assert sum(length > IMAGE_TOKENS for length in passes) == 1


def test_common_layers_follow_from_stages(random_llava):
    from corematching.models.families import family_of

    geometry = family_of(random_llava.config).geometry(random_llava.config)
    stages = [build(name).stages(geometry) for name in ("fastv", "pyramiddrop", "visionzip")]
    assert common_layers(stages, 6) == {0}
    assert common_layers([*stages, []], 6) == {0, 1}
    assert common_layers([[], []], 6) == set(range(6))
    assert common_layers([[]], 6) == set()


def test_ended_rows_leave_the_batch(random_llava):
    batch, pixels, images = batch_about_two_images()
    method = build("fastv")
    whole, _ = shared(random_llava, method, batch, pixels, images)
    ends = [int(whole[0, 0]), int(whole[3, 0]), int(whole[1, 1])]
    widths = []
    hook = random_llava.lm_head.register_forward_pre_hook(lambda module, args: widths.append(len(args[0])))
    sharing = Sharing.of(batch["input_ids"], batch["attention_mask"], images, IMAGE_TOKEN)
    try:
        with torch.inference_mode(), method(random_llava), sharing_prompts(random_llava, sharing):
            ids = decode(random_llava, {**batch, "pixel_values": pixels}, TOKENS, ends=ends, pad=0)
    finally:
        hook.remove()
    assert widths[0] == 5
    assert min(widths) < 5
    for row, answer in zip(whole.tolist(), ids.tolist(), strict=True):
        stop = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
        assert answer[: stop + 1] == row[: stop + 1]
        assert set(answer[stop + 1 :]) <= {0}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([(), ("x",), ("y",), ("x", "y")]), st.integers(1, 90))),
    st.integers(1, 7),
    st.integers(1, 300),
)
def test_every_question_is_in_exactly_one_batch_that_fits(asked, most_rows, most_tokens):
    questions = [Asked(settings, pictures, tokens) for settings, pictures, tokens in asked]
    batches = plan(questions, most_rows, most_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(questions)))
    for batch in batches:
        own = [questions[index] for index in batch]
        assert len({(question.settings, len(question.pictures)) for question in own}) == 1
        assert len(batch) <= most_rows
        assert len(batch) == 1 or len(batch) * max(question.tokens for question in own) <= most_tokens
    about = {}
    for index, question in enumerate(questions):
        about.setdefault((question.settings, question.pictures), []).append(index)
    for group in (group for (_, pictures), group in about.items() if pictures):
        if len(group) <= most_rows and len(group) * max(questions[index].tokens for index in group) <= most_tokens:
            assert any(set(group) <= set(batch) for batch in batches), "pictures are encoded twice"
