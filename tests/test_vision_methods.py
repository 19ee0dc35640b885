"""Vision-side and pre-LLM methods: one matrix of methods times the properties that all of them promise."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import IMAGE_TOKENS, left_pad, make_prompt, word_tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

import corematching as cm

LAYERS = 6
REDUCED = {
    "pooling": ({"keep": 12}, 12),
    "pooling in the LLM": ({"keep": 16, "layer": 2}, 16),
    "tome": ({"r": 7}, IMAGE_TOKENS - 3 * 7),
    "tome decreasing": ({"r": (6, -1.0)}, IMAGE_TOKENS - 12 - 8 - 4),
    "tome without sizes": ({"r": [9, 4], "proportional_attention": False}, IMAGE_TOKENS - 13),
    "tome_pre_llm": ({"keep": 11}, 11),
    "prumerge": ({"keep_ratio": 0.25}, 17),
    "prumerge adaptive": ({}, None),
    "prumerge_plus": ({"keep_ratio": 0.2}, 12 + 13 + 1),
    "prumerge_plus adaptive": ({}, None),
    "visionzip": ({"dominant": 9, "contextual": 4}, 13),
    "visionzip by keep": ({"keep": 12}, 12),
    "visionzip dominant only": ({"dominant": 9, "contextual": 0}, 9),
    "fastervlm": ({"keep": 10}, 10),
    "vtc_cls": ({"layer": 1, "keep": 10}, 10),
    "as_vit": ({"layers": (1, 2), "thresholds": (0.008, 0.016)}, None),
    "as_vit late": ({"layers": (2,), "thresholds": (0.012,)}, None),
    "divprune": ({"keep": 0.32}, 20),
    "dart": ({"keep": 24, "layer": 2}, 4 + 3 * 8),
}
"""Per case: parameters, and the visual tokens per image left after the method acted (None = adaptive)."""

EVERYTHING = {
    "pooling": {"keep": 1.0},
    "tome": {"r": 0},
    "tome_pre_llm": {"keep": IMAGE_TOKENS},
    "prumerge": {"keep_ratio": 1.0},
    "prumerge_plus": {"keep_ratio": 1.0},
    "visionzip": {"dominant": IMAGE_TOKENS - 4, "contextual": 4},
    "fastervlm": {"keep": 1.0},
    "vtc_cls": {"layer": 0, "keep": IMAGE_TOKENS},
    "as_vit": {"layers": (1, 2), "thresholds": (0.0, 0.0)},
    "divprune": {"keep": 1.0},
    "dart": {"keep": 1.0},
    "cdpruner": {"keep": 1.0},
}


def build(case):
    return cm.build_method(case.split()[0], **REDUCED[case][0])


def greedy(model, inputs, **kwargs):
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, **kwargs}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
@pytest.mark.parametrize("name", EVERYTHING)
def test_keeping_everything_is_dense_bit_for_bit(name, random_llava, prompts):
    batch = left_pad(prompts)
    dense = random_llava(**batch).logits
    with cm.build_method(name, **EVERYTHING[name])(random_llava) as trace:
        assert torch.equal(random_llava(**batch).logits, dense)
    assert [sample.average_visual_tokens for sample in trace.samples] == [64, 64, 128]


@torch.no_grad()
@pytest.mark.parametrize("case", REDUCED)
def test_batches_budgets_caches_and_removal(case, random_llava, prompts):
    """One pass checks what needs the same runs: batch = one by one, the budget, cache lengths, and dense after."""
    before = random_llava(**prompts[0]).logits
    kept = REDUCED[case][1]
    with build(case)(random_llava) as trace:
        together = greedy(random_llava, left_pad(prompts))
        batch = trace.drain()
        for row, prompt in enumerate(prompts):
            assert torch.equal(greedy(random_llava, prompt)[0], together[row]), f"sample {row}"
            (alone,) = trace.drain()
            for layer in range(LAYERS):
                assert torch.equal(alone.visual_tokens[layer], batch[row].visual_tokens[layer])
            images = 1 if case == "dart" else alone.images  # dart's budget is per sample
            if kept is not None:
                assert len(alone.visual_tokens[-1]) == kept * images
            assert 0 < len(alone.visual_tokens[-1]) < alone.image_tokens
        cache = random_llava(**prompts[2], use_cache=True).past_key_values
        (sample,) = trace.drain()
        assert [layer.keys.shape[2] for layer in cache.layers] == sample.kv_lengths == sample.llm_tokens
    assert torch.equal(random_llava(**prompts[0]).logits, before)


@torch.no_grad()
@pytest.mark.parametrize(
    "case", ["tome", "tome_pre_llm", "prumerge adaptive", "fastervlm", "as_vit", "dart", "pooling"]
)
def test_a_prompt_without_image_shares_a_batch(case, random_llava, prompts):
    batch = left_pad([make_prompt(7, images=0), prompts[2]])
    text_only = {key: batch[key][:1] for key in ("input_ids", "attention_mask")}
    with build(case)(random_llava) as trace:
        together = random_llava(**batch).logits
        without, with_image = trace.drain()
        alone = random_llava(**prompts[2]).logits
        dense = random_llava(**text_only).logits
    torch.testing.assert_close(together[0, -1], dense[0, -1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[1, -1], alone[0, -1], atol=1e-4, rtol=1e-4)
    assert without.image_tokens == 0
    assert len(with_image.visual_tokens[-1]) < with_image.image_tokens == 2 * IMAGE_TOKENS


@torch.no_grad()
def test_an_image_prompt_without_pixels_is_refused_not_answered_from_the_last_image(random_llava, prompts):
    text_only = {key: value for key, value in prompts[0].items() if key != "pixel_values"}
    with build("fastervlm")(random_llava):
        random_llava(**prompts[0])
        with pytest.raises(cm.UserError, match="pixel_values"):
            random_llava(**text_only)


@torch.no_grad()
@pytest.mark.parametrize("case", ["tome", "prumerge adaptive", "visionzip", "dart", "pooling"])
def test_beam_search_answers_alike_alone_and_in_a_batch(case, random_llava, prompts):
    with build(case)(random_llava):
        beams = greedy(random_llava, left_pad(prompts), num_beams=3)
        single = torch.cat([greedy(random_llava, prompt, num_beams=3) for prompt in prompts])
    assert torch.equal(beams, single)


@torch.no_grad()
@pytest.mark.parametrize("case", ["tome", "tome_pre_llm", "prumerge", "visionzip", "as_vit", "divprune"])
def test_the_image_decides_not_only_its_place(case, random_llava):
    """Another picture behind the same text changes what is kept or merged."""
    first, second = make_prompt(3), make_prompt(4)
    second = {**first, "pixel_values": second["pixel_values"]}
    with build(case)(random_llava) as trace:
        random_llava(**first)
        random_llava(**second)
    kept = [sample.visual_tokens[-1] for sample in trace.samples]
    assert not torch.equal(*kept)


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "shorter"),
    [("fastervlm", True), ("divprune", True), ("visionzip", True), ("as_vit", False), ("dart", False)],
)
def test_position_ids_follow_the_official_code(case, shorter, random_llava):
    """Renumbering methods hand the decoder consecutive positions, the others the original ones."""
    seen = []
    hook = random_llava.model.language_model.layers[-1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"][0]), with_kwargs=True
    )
    prompt = make_prompt(3)
    try:
        with build(case)(random_llava):
            random_llava(**prompt)
    finally:
        hook.remove()
    length = len(seen[0])
    assert length < prompt["input_ids"].shape[1]
    assert seen[0].tolist() == sorted(seen[0].tolist())
    assert (int(seen[0][-1]) == length - 1) == shorter


@torch.no_grad()
@pytest.mark.parametrize("case", REDUCED)
def test_half_precision_runs_and_meets_the_budget(case, random_llava):
    prompt = make_prompt(3)
    model = copy.deepcopy(random_llava).bfloat16()
    with build(case)(model) as trace:
        logits = model(**{**prompt, "pixel_values": prompt["pixel_values"].bfloat16()}).logits
    assert logits.isfinite().all()
    if REDUCED[case][1] is not None:
        assert len(trace.samples[0].visual_tokens[-1]) == REDUCED[case][1]


@torch.no_grad()
def test_trace_and_overhead_tell_what_ran(random_llava):
    def sample_of(case):
        with build(case)(random_llava) as trace:
            random_llava(**make_prompt(3))
        return trace.samples[0]

    merged = sample_of("tome")
    # [CLS] and 64 patches; merges stand between attention and MLP.
    assert merged.vision_tokens == [65, 58, 51, 44]
    assert merged.vision_mlp_tokens == [58, 51, 44, 37]
    assert merged.projected_tokens == 43
    assert merged.overhead_flops > 0
    zipped = sample_of("visionzip")
    assert (zipped.visual_tokens[0] == -1).sum() == 1 + 4  # [CLS] and the contextual sums
    assert zipped.projected_tokens == 13
    assert sample_of("divprune").projected_tokens == 64  # it chooses after the projector


@torch.no_grad()
def test_as_vit_keeps_each_images_patches_above_the_thresholds(random_llava):
    """Against one image at a time, a softmax written out, and lists of the patches that are left."""
    layers, thresholds = (1, 2), (0.008, 0.016)
    prompt = make_prompt(5, images=3)
    tower = random_llava.model.vision_tower
    wanted, features = [], []
    for pixels in prompt["pixel_values"]:
        hidden = tower.pre_layrnorm(tower.embeddings(pixels[None]))[0]
        left, scores = list(range(64)), None
        for index, block in enumerate(tower.encoder.layers[:3]):
            if index in layers:
                stay = [i for i, score in enumerate(scores) if score > thresholds[layers.index(index)]]
                left, hidden = [left[i] for i in stay], hidden[[0, *(i + 1 for i in stay)]]
            attn, normed = block.self_attn, block.layer_norm1(hidden)
            q, k, v = (
                linear(normed).view(len(hidden), 2, 16).transpose(0, 1)
                for linear in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
            attention = (q @ k.transpose(1, 2) / 4).softmax(-1)
            heads = attention @ v
            lengths = heads.norm(dim=2)
            scores = sum(attention[h, 0] * lengths[h] / lengths.sum(0) for h in range(2))[1:].tolist()
            hidden = hidden + attn.out_proj(heads.transpose(0, 1).flatten(1))
            hidden = hidden + block.mlp(block.layer_norm2(hidden))
        wanted.append(left)
        features.append(random_llava.model.multi_modal_projector(hidden[1:]))
    with cm.build_method("as_vit", layers=layers, thresholds=thresholds)(random_llava) as trace:
        seen = random_llava(**prompt).image_hidden_states
    assert len({len(left) for left in wanted}) > 1, "the images must differ for the test to tell anything"
    assert trace.samples[0].visual_tokens[0].tolist() == [64 * n + i for n, left in enumerate(wanted) for i in left]
    torch.testing.assert_close(seen, torch.cat(features), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_as_vit_costs_what_ran_and_always_leaves_a_patch(random_llava, prompts):
    with cm.build_method("as_vit", layers=(1, 2), thresholds=(0.008, 0.016))(random_llava) as trace:
        for prompt in prompts:
            with FlopCounterMode(display=False) as counter:
                greedy(random_llava, prompt)
            counted = cm.flops(random_llava.config, trace)
            assert counted.total == pytest.approx(counter.get_total_flops(), rel=0.01)
            trace.drain()
    with cm.build_method("as_vit", layers=(1, 2), thresholds=(0.5, 0.9))(random_llava) as trace:
        random_llava(**prompts[2])
    assert [len(trace.samples[0].visual_tokens[0]), trace.samples[0].projected_tokens] == [2, 2]


@torch.no_grad()
def test_pooling_averages_neighbours(random_llava):
    """A quarter of the 8 x 8 grid is the 2 x 2 mean, listed by the lower right patch of each cell."""
    entered = []
    hook = random_llava.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args: entered.append(args[0])
    )
    prompt = make_prompt(3)
    try:
        random_llava(**prompt)
        with cm.build_method("pooling")(random_llava) as trace:
            random_llava(**prompt)
    finally:
        hook.remove()
    grid = entered[0][0, 5 : 5 + IMAGE_TOKENS].reshape(8, 8, -1)
    means = (grid[::2, ::2] + grid[::2, 1::2] + grid[1::2, ::2] + grid[1::2, 1::2]).flatten(0, 1) / 4
    torch.testing.assert_close(entered[1][0, 5:21], means)
    assert trace.samples[0].visual_tokens[0].tolist()[:5] == [9, 11, 13, 15, 25]


@pytest.mark.parametrize(("keep", "split"), [(64, (54, 10)), (128, (108, 20)), (192, (162, 30)), (1, (1, 0))])
def test_visionzip_splits_keep_as_the_official_settings_do(keep, split):
    assert cm.build_method("visionzip", keep=keep).split(576) == split


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("tome", {"r": -1}, r"r=-1 "),
        ("tome", {"r": [3, 2.5]}, r"r=\(3, 2.5\)"),
        ("visionzip", {"dominant": 0}, r"dominant=0 "),
        ("visionzip", {"contextual": 2.5}, r"contextual=2.5 "),
        ("prumerge", {"keep_ratio": 1.5}, r"keep_ratio=1.5 "),
        ("prumerge_plus", {"keep_ratio": 0.7}, r"keep_ratio=0.7 .*0.5"),
        ("dart", {"image_pivots": 0}, r"image_pivots=0 "),
        ("divprune", {"keep": 0}, r"keep=0 "),
        ("as_vit", {"thresholds": [0.1, 0.2]}, r"thresholds=\[0.1, 0.2\] .*layers=\[6, 12, 18\]"),
        ("as_vit", {"thresholds": [0.1, 0.2, 1.0]}, r"thresholds=.*at most 1"),
        ("as_vit", {"layers": [6, 18, 12]}, r"layers=.*ascending"),
    ],
)
def test_bad_parameters_are_named(name, parameters, message):
    with pytest.raises(cm.UserError, match=message):
        cm.build_method(name, **parameters)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("tome", {"r": [1, 2, 3, 4, 5]}, r"5 blocks.*has 4"),
        ("visionzip", {"dominant": 60, "contextual": 6}, r"66 tokens.*at most 65"),
        ("visionzip", {"keep": 65}, r"keep=65 .*64"),
        ("vtc_cls", {"layer": 3, "keep": 10}, r"layer=3 .*0 to 2"),
        ("fastervlm", {"keep": 65}, r"keep=65 .*64"),
        ("as_vit", {}, r"layers=6 .*1 to 2"),
        ("cdpruner", {"keep": 10}, r"text_model=None"),
    ],
)
def test_parameters_that_do_not_fit_the_model_are_named(name, parameters, message, random_llava):
    with pytest.raises(cm.UserError, match=message), cm.build_method(name, **parameters)(random_llava):
        pass


# ------------------------------------------------------------------------------------------------- cdpruner end to end
@torch.no_grad()
def test_cdpruner_reads_the_instruction(text_model, readable_llava, prompts):
    kept = {}
    with cm.build_method("cdpruner", keep=9, text_model=text_model)(readable_llava) as trace:
        for name, question in {
            "short": [5, 6],
            "marked": [5, 6, 98],
            "other": [40],
            "long": list(range(3, 30)),
        }.items():
            prompt = make_prompt(3, text=0)
            ids = torch.cat([prompt["input_ids"], torch.tensor([question])], 1)
            readable_llava(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=prompt["pixel_values"])
            kept[name] = trace.drain()[0].visual_tokens[0].tolist()
        together = greedy(readable_llava, left_pad(prompts))
        assert [len(sample.visual_tokens[0]) for sample in trace.drain()] == [9, 9, 18]
        for row, prompt in enumerate(prompts):
            assert torch.equal(greedy(readable_llava, prompt)[0], together[row])
    assert len(kept["short"]) == len(kept["long"]) == 9
    assert kept["marked"] == kept["short"]  # the closing role marker is no part of the instruction
    assert kept["other"] != kept["short"]


@torch.no_grad()
def test_cdpruner_books_its_text_tower(text_model, readable_llava, prompts):
    with cm.build_method("cdpruner", keep=9, text_model=text_model)(readable_llava) as trace:
        greedy(readable_llava, prompts[0])  # loads the tower
        trace.drain()
        with FlopCounterMode(display=False) as counter:
            greedy(readable_llava, prompts[0])
    assert cm.flops(readable_llava.config, trace).total == pytest.approx(counter.get_total_flops(), rel=0.01)


@torch.no_grad()
def test_cdpruner_refuses_a_clip_of_another_tower(readable_llava, tmp_path_factory, prompts):
    folder = tmp_path_factory.mktemp("wide")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPModel(CLIPConfig(text_config={**small, "vocab_size": 100}, vision_config=small)).save_pretrained(folder)
    word_tokenizer(ends=True).save_pretrained(folder)
    method = cm.build_method("cdpruner", keep=9, text_model=str(folder))
    with method(readable_llava), pytest.raises(cm.UserError, match=r"width 16.*has 32"):
        readable_llava(**prompts[0])
    method = cm.build_method("cdpruner", keep=9, text_model=str(folder / "missing"))
    with method(readable_llava), pytest.raises(cm.UserError, match=r"missing.*cannot be loaded"):
        readable_llava(**prompts[0])
