"""Language-side baselines: what every one of them must hold, then each against its definition."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import IMAGE_TOKENS, left_pad, make_prompt
from parity_llm import compare, recorded
from scipy.stats import spearmanr

import corematching as cm
from corematching.methods.clustering import cluster_means, density_peak_clusters
from corematching.methods.topv import every_nth, grid_distances, sinkhorn

DEPTH, WIDTH = 6, 48
GOLDENS = Path(__file__).parent / "goldens"

REDUCED = {
    "sparsevlm": {"schedule": [30, 20, 8], "layers": [0, 2, 4]},
    "sparsevlm 2.0": {"version": "2.0", "schedule": [30, 20, 8], "layers": [0, 2, 4], "priority_heads": 2},
    "pyramiddrop": {"layers": [1, 3, 5], "keeps": [0.5, 0.25, 0.125]},
    "topv": {"layer": 1, "keep": 12},
    "sgl": {"keep": 10},
    "streaming_llm": {"keep": 20},
    "h2o": {"keep": 20, "recent": 6},
    "snapkv": {"keep": 20, "window": 6},
    "csp": {"keep": 20, "recent": 6},
    "pyramidkv": {"keep": 20, "window": 6},
    "refreshkv": {"keep": 20, "every": 2},
    "actqkv": {"keep": 24, "first": 4, "last": 6, "block": 4, "warm_up": 1},
    "attention_predictor": {"keep": 24, "first": 4, "last": 6, "block": 4},
    "pod": {"keep": 24, "first": 4, "gate": 0.1, "observe": 4},
    "coreinfer": {"keep": 0.3, "token_keep": 0.4},
    "wanda_neurons": {"keep": 0.3},
    "random_neurons": {"keep": 0.3},
    "dejavu": {"keep": 0.3},
    "powerinfer": {"keep": 0.3, "hot_fraction": 0.1},
}
EVERYTHING = {
    "sparsevlm": {"schedule": [1.0, 1.0, 1.0], "layers": [0, 2, 4]},
    "sparsevlm 2.0": {"version": "2.0", "schedule": [1.0, 1.0, 1.0], "layers": [0, 2, 4], "priority_heads": 2},
    "pyramiddrop": {"layers": [1, 3, 5], "keeps": [1.0, 1.0, 1.0]},
    "topv": {"layer": 1, "keep": 1.0},
    "sgl": {"keep": 1.0},
    "streaming_llm": {"keep": 1.0},
    "h2o": {"keep": 1.0},
    "snapkv": {"keep": 1.0, "window": 6},
    "csp": {"keep": 1.0},
    "pyramidkv": {"keep": 1.0, "window": 6},
    "adakv": {"keep": 1.0, "window": 6},
    "refreshkv": {"keep": 1.0},
    "actqkv": {"keep": 1.0},
    "attention_predictor": {"keep": 1.0},
    "pod": {"keep": 1.0},
    "coreinfer": {"keep": 1.0},
    "wanda_neurons": {"keep": 1.0},
    "random_neurons": {"keep": 1.0},
    "dejavu": {"keep": 1.0},
    "powerinfer": {"keep": 1.0},
}


@pytest.fixture(scope="session")
def build(small_guide, predictor_file):
    """``build_method`` by the names above, with the files some methods need."""

    def build(name, **parameters):
        name = name.split()[0]
        if name == "sgl":
            parameters.setdefault("guide", small_guide)
        if name in ("dejavu", "powerinfer"):
            parameters.setdefault("predictor", predictor_file)
        return cm.build_method(name, **parameters)

    return build


def greedy(model, inputs, **kwargs):
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, **kwargs}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def fingerprint(model):
    """Attributes and hooks of every module."""
    return {
        path: (set(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for path, module in model.named_modules()
    }


# ------------------------------------------------------------------------------------------------ what all must hold
@torch.no_grad()
@pytest.mark.parametrize("name", EVERYTHING)
def test_keeping_everything_is_dense_bit_for_bit(name, build, random_llava, prompts):
    batch = left_pad(prompts)
    dense, dense_ids = random_llava(**batch).logits, greedy(random_llava, batch)
    with build(name, **EVERYTHING[name])(random_llava) as trace:
        assert torch.equal(random_llava(**batch).logits, dense)
        assert torch.equal(greedy(random_llava, batch), dense_ids)
    assert trace.samples[0].average_visual_tokens == IMAGE_TOKENS


@torch.no_grad()
@pytest.mark.parametrize("name", REDUCED)
def test_batch_answers_like_one_by_one_and_the_cache_is_what_the_trace_says(name, build, random_llava, prompts):
    with build(name, **REDUCED[name])(random_llava) as trace:
        together = greedy(random_llava, left_pad(prompts))
        batch = trace.drain()
        for row, prompt in enumerate(prompts):
            output = random_llava.generate(
                **prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, return_dict_in_generate=True
            )
            assert torch.equal(output.sequences[0, prompt["input_ids"].shape[1] :], together[row]), f"sample {row}"
            (alone,) = trace.drain()
            assert alone.kv_lengths == batch[row].kv_lengths
            stored = [layer.keys.shape[2] for layer in output.past_key_values.layers]
            assert stored == [length + alone.decode_steps for length in alone.kv_lengths]
            for layer in range(DEPTH):
                assert torch.equal(alone.visual_tokens[layer], batch[row].visual_tokens[layer])
                if alone.neurons[layer] is not None:
                    assert torch.equal(alone.neurons[layer], batch[row].neurons[layer])


@torch.no_grad()
@pytest.mark.parametrize("name", REDUCED)
def test_model_is_untouched_afterwards_and_beams_and_sampling_run(name, build, random_llava, prompts):
    before = random_llava(**prompts[0]).logits
    modules = fingerprint(random_llava)
    with build(name, **REDUCED[name])(random_llava) as trace:
        beams = greedy(random_llava, left_pad(prompts[:2]), num_beams=2)
        alone = torch.cat([greedy(random_llava, prompt, num_beams=2) for prompt in prompts[:2]])
        assert greedy(random_llava, prompts[0], do_sample=True).shape == (1, 5)
    assert torch.equal(beams, alone)
    assert len(trace.samples) == 4 + 2 + 2 + 1
    assert torch.equal(random_llava(**prompts[0]).logits, before)
    assert fingerprint(random_llava) == modules


@torch.no_grad()
@pytest.mark.parametrize("name", REDUCED)
def test_something_is_saved_and_the_cost_of_choosing_is_booked(name, build, random_llava):
    prompt = make_prompt(11)
    with cm.build_method("dense")(random_llava) as trace:
        greedy(random_llava, prompt)
    (dense,) = trace.drain()
    with build(name, **REDUCED[name])(random_llava) as trace:
        greedy(random_llava, prompt)
    (sample,) = trace.drain()
    assert (
        sample.average_visual_tokens < dense.average_visual_tokens
        or sample.kv_bytes < dense.kv_bytes
        or any(min(read) < sample.rows_held(layer, 0) for layer, read in enumerate(sample.rows_read))
        or all(len(neurons) < WIDTH for neurons in sample.neurons)
    )
    free = name in (
        "streaming_llm",
        "coreinfer",
        "wanda_neurons",
        "random_neurons",
    )  # sorting and norms: no matrix product
    assert sample.overhead_flops > 0 or free or name == "sgl"
    assert cm.flops(random_llava.config, sample).overhead > 0 or free


@torch.no_grad()
@pytest.mark.parametrize("name", ["sparsevlm", "sparsevlm 2.0", "pyramiddrop", "topv", "csp", "sgl"])
def test_prompts_without_an_image_share_a_batch_with_others(name, build, random_llava):
    ids = torch.arange(3, 26)[None]
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    image = make_prompt(1)
    mixed = left_pad([{**text, "pixel_values": image["pixel_values"][:0]}, image])
    parameters = {**REDUCED[name], **({"early_exit": 1e-30} if name == "sgl" else {})}
    with build(name, **parameters)(random_llava) as trace:
        together = greedy(random_llava, mixed)
        alone = torch.cat([greedy(random_llava, text), greedy(random_llava, image)])
    assert torch.equal(together, alone)
    assert [sample.image_tokens for sample in trace.samples] == [0, 64, 0, 64]


@pytest.mark.parametrize(("method", "path"), recorded(GOLDENS), ids=lambda value: getattr(value, "stem", value))
def test_official_recordings_are_reproduced(method, path):
    row = compare(method, path)
    assert row.indices_equal
    assert row.max_difference <= row.tolerance


# ----------------------------------------------------------------------------------------------------------- SparseVLM
@torch.no_grad()
def test_sparsevlm_recycles_into_new_tokens_before_the_question(random_llava):
    prompt = make_prompt(1)
    method = cm.build_method("sparsevlm", schedule=[20, 10], layers=[1, 3])
    with method(random_llava) as trace:
        random_llava(**prompt)
    sample = trace.samples[0]
    # 44 pruned: int(13.2) + 1 = 14 recycled into 14 // 10 + 1 = 2 clusters; then 12 pruned: 4 recycled into 1.
    assert [len(layer) for layer in sample.visual_tokens] == [64, 64, 22, 22, 11, 11]
    assert (sample.visual_tokens[2] == -1).sum() == 2
    kept = sample.visual_tokens[2][sample.visual_tokens[2] >= 0]
    assert len(kept) == 20
    assert len(kept.unique()) == 20


@torch.no_grad()
def test_sparsevlm_score_is_the_raters_mean_attention(random_llava):
    """Against eager attention matrices of the stock model and raters found by hand."""
    prompt = make_prompt(2, text=9)
    with cm.build_method("sparsevlm", schedule=[12], layers=[2])(random_llava) as trace:
        random_llava(**prompt)
    kept = trace.samples[0].visual_tokens[3]
    ids, start = prompt["input_ids"], 5
    embeds = random_llava.get_input_embeddings()(ids)
    features = random_llava.model.get_image_features(prompt["pixel_values"]).pooler_output[0]
    match = (features @ embeds[0, -9:].T).softmax(1).mean(0)
    raters = ids.shape[1] - 9 + (match > match.mean()).nonzero()[:, 0]
    attention = eager_attention(random_llava, prompt)[2]
    score = attention[0].mean(0)[raters, start : start + IMAGE_TOKENS].mean(0)
    assert kept[kept >= 0].tolist() == score.topk(12).indices.sort().values.tolist()


@torch.no_grad()
def test_sparsevlm_paper_counts_follow_the_rank(random_llava, prompts):
    method = cm.build_method("sparsevlm", schedule="rank", rank_scale=0.5, layers=[2])
    with method(random_llava) as trace:
        together = greedy(random_llava, left_pad(prompts))
        batch = trace.drain()
        alone = torch.cat([greedy(random_llava, prompt) for prompt in prompts])
        single = trace.drain()
    assert torch.equal(together, alone)
    for sample, own in zip(batch, single, strict=True):
        assert torch.equal(sample.visual_tokens[3], own.visual_tokens[3])
    kept = [int((sample.visual_tokens[3] >= 0).sum()) for sample in batch]
    # Raters are at most the question's tokens, and so is the rank of their attention.
    for count, total, question in zip(kept, (64, 64, 128), (5, 17, 9), strict=True):
        ranks = range(1, question + 1)
        assert count in {total - int(0.5 * (total - rank)) for rank in ranks}
    assert kept[1] > kept[0]


def eager_attention(model, inputs):
    """Attention probabilities of every layer, as the stock model computes them with its eager kernel."""
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return model(**inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(kernel)


def test_clusters_are_around_dense_far_apart_tokens():
    generator = torch.Generator().manual_seed(0)
    places = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    tokens = (places[:, None] + 0.1 * torch.randn(3, 5, 2, generator=generator)).flatten(0, 1)[None]
    centres, assignment = density_peak_clusters(tokens, 3)
    groups = assignment[0].unflatten(0, (3, 5))
    assert (groups == groups[:, :1]).all()
    assert len(assignment.unique()) == 3
    assert torch.equal(assignment.gather(1, centres), torch.arange(3)[None])
    means = cluster_means(tokens, assignment, 3)[0]
    torch.testing.assert_close(means[groups[:, 0]], tokens[0].unflatten(0, (3, 5)).mean(1), atol=1e-4, rtol=1e-4)


def test_one_cluster_holds_everything():
    tokens = torch.randn(2, 7, 4)
    _, assignment = density_peak_clusters(tokens, 1)
    assert (assignment == 0).all()


# ---------------------------------------------------------------------------------------------------------------- TopV
def test_sinkhorn_meets_the_marginals_and_follows_the_cost():
    cost = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(1))
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    plan = sinkhorn(cost, valid, epsilon=0.1, iterations=200)
    torch.testing.assert_close(plan.sum(1), valid / valid.sum(1, keepdim=True).float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(plan.sum(2), valid / valid.sum(1, keepdim=True).float(), atol=1e-4, rtol=1e-3)
    assert (plan[1, 4:] == 0).all()
    # With a sharp plan, transport is the best assignment.
    cost = torch.tensor([[[0.0, 1, 1], [1, 1, 0], [1, 0, 1]]])
    plan = sinkhorn(cost, torch.ones(1, 3, dtype=torch.bool), epsilon=0.02, iterations=50)
    assert plan[0].argmax(1).tolist() == [0, 2, 1]


def test_grid_distances_are_shares_of_the_diagonal():
    apart, central = grid_distances(*on_grid(torch.tensor([[0, 8, 63, 64]]), 8))
    assert apart[0, 0, 2] == pytest.approx(1.0)
    assert apart[0, 0, 1] == pytest.approx(1 / (7 * 2**0.5))
    assert apart[0, 0, 3] == 1.0  # another image
    assert central[0, 0] == pytest.approx(1.0)
    assert grid_distances(*on_grid(torch.tensor([[4]]), 3))[1].item() == 0
    wide = grid_distances(torch.zeros(1, 2), torch.tensor([[[0, 0], [1, 3]]]), torch.tensor([[[2, 3], [2, 3]]]))
    assert wide[0][0, 0, 1] == pytest.approx(1.0)  # behind the last column, as newlines are, counts as in it


def on_grid(origin: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which square grid tokens lie in, where, and its size."""
    index = origin % side**2
    places = torch.stack([index // side, index % side], 2)
    return origin // side**2, places, torch.full_like(places, side)


def test_recovery_is_evenly_spread():
    mask = torch.tensor([[True, False, True, True, True, True, False, True, True, True]] * 2)
    chosen = every_nth(mask, [8, 8], [4, 0])
    assert chosen.sum(1).tolist() == [4, 0]
    assert (mask[0].nonzero()[:, 0].tolist())[1::2] == chosen[0].nonzero()[:, 0].tolist()


@torch.no_grad()
def test_topv_keeps_exactly_what_was_asked_and_every_choice_matters(random_llava, prompts):
    def kept(**parameters):
        with cm.build_method("topv", **{"layer": 1, "keep": 13, **parameters})(random_llava) as trace:
            random_llava(**prompts[2])
        assert [len(layer) for layer in trace.samples[0].visual_tokens] == [128, 128, 13, 13, 13, 13]
        return trace.samples[0].visual_tokens[2].tolist()

    default = kept()
    for change in (
        {"recover": 0.5},
        {"feature_weight": 0.0},
        {"spatial_weight": 3.0},
        {"central_weight": 2.0},
        {"epsilon": 2.0},
        {"importance": "mass", "iterations": 1},
        {"terms": "raw"},
    ):
        assert kept(**change) != default, change
    assert kept() == default


@torch.no_grad()
def test_topv_prefers_the_centre_when_only_the_centre_counts(random_llava):
    parameters = {"feature_weight": 0.0, "spatial_weight": 0.0, "central_weight": 1.0, "recover": 0.0}
    with cm.build_method("topv", layer=0, keep=4, **parameters)(random_llava) as trace:
        random_llava(**make_prompt(3))
    assert trace.samples[0].visual_tokens[1].tolist() == [27, 28, 35, 36]


@pytest.mark.parametrize("width", [32, 256])
@pytest.mark.parametrize("epsilon", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("related", [True, False])
def test_topv_does_not_rank_random_features_by_their_distance_from_the_centre(width, epsilon, related):
    generator = torch.Generator().manual_seed(width)
    side = 16
    sources = torch.randn(1, side * side, width, generator=generator)
    targets = torch.randn(1, side * side, width, generator=generator) * 0.5 + (sources if related else 0)
    origin = torch.arange(side * side)[None]
    owner, places, sizes = on_grid(origin, side)
    facts = {"image": owner, "tile": owner, "row": places[..., 0], "column": places[..., 1]}
    facts |= {"tile_rows": sizes[..., 0], "tile_columns": sizes[..., 1]}
    view = SimpleNamespace(
        entered=sources,
        attended=lambda: targets,
        gather=lambda values: values,
        fact=lambda name: facts[name],
        visual_valid=torch.ones(1, side * side, dtype=torch.bool),
    )
    central = grid_distances(*on_grid(origin, side))[1][0]

    def explained(**parameters):
        scores = cm.build_method("topv", epsilon=epsilon, **parameters).scores(view)[0]
        return float(spearmanr(scores, -central).statistic)

    assert abs(explained()) < 0.55
    assert explained(terms="raw", spatial_weight=0.5) > 0.65
    features = cm.build_method("topv", epsilon=epsilon, spatial_weight=0.0, central_weight=0.0).scores(view)[0]
    ours = cm.build_method("topv", epsilon=epsilon).scores(view)[0]
    assert float(spearmanr(ours, features).statistic) > 0.5


# ----------------------------------------------------------------------------------------------------------------- SGL
@torch.no_grad()
@pytest.mark.parametrize(("observers", "first"), [("last_visual", 1), ("after_image", 0)])
def test_sgl_keeps_what_the_guide_attended_to(observers, first, random_llava, small_guide):
    prompt = make_prompt(12, text=8)
    method = cm.build_method("sgl", guide=small_guide, keep=9, layer_fraction=0.5, observers=observers)
    with method(random_llava) as trace:
        greedy(random_llava, prompt, max_new_tokens=4)
    (sample,) = trace.samples
    guide, _ = cm.load_model(small_guide)
    answer = greedy(guide, prompt, max_new_tokens=4, suppress_tokens=[99])
    whole = torch.cat([prompt["input_ids"], answer[:, :-1]], 1)
    inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole), "pixel_values": prompt["pixel_values"]}
    attention = torch.stack(eager_attention(guide, inputs))[:, 0].sum((0, 1))
    after_image = 5 + IMAGE_TOKENS
    # The last visual token is the first to look.
    score = attention[after_image - first :, 5:after_image].sum(0)
    assert [len(layer) for layer in sample.visual_tokens] == [64, 64, 64, 9, 9, 9]
    assert sample.visual_tokens[3].tolist() == score.topk(9).indices.sort().values.tolist()
    assert sample.guide.passes[0].decode_steps == 3
    assert not sample.guide.answered


@torch.no_grad()
def test_sgl_without_generate_reads_the_prompt_only(random_llava, small_guide):
    prompt = make_prompt(13)
    with cm.build_method("sgl", guide=small_guide, keep=9)(random_llava) as trace:
        random_llava(**prompt)
    (sample,) = trace.samples
    assert len(sample.visual_tokens[-1]) == 9
    assert sample.guide.passes[0].decode_steps == 0


@torch.no_grad()
@pytest.mark.parametrize("exit_score", ["mean", "confidence", "consistency"])
def test_sgl_early_exit_takes_confident_answers_and_only_those(exit_score, random_llava, small_guide, prompts):
    parameters = {"guide": small_guide, "keep": 0.5, "consistency_keep": 0.25, "exit_score": exit_score}

    def answer(early_exit, inputs):
        with cm.build_method("sgl", early_exit=early_exit, **parameters)(random_llava) as trace:
            return greedy(random_llava, inputs, max_new_tokens=3), trace.samples

    guide, _ = cm.load_model(small_guide)
    small = [greedy(guide, prompt, max_new_tokens=3, suppress_tokens=[99])[0] for prompt in prompts]
    large = [answer(None, prompt)[0][0] for prompt in prompts]
    sure = [confidence_of(guide, prompt, own) for prompt, own in zip(prompts, small, strict=True)]
    again = [rescored(guide, prompt, own, keep=0.25) for prompt, own in zip(prompts, small, strict=True)]
    both = [(one + other) / 2 for one, other in zip(sure, again, strict=True)]
    confidence = {"mean": both, "confidence": sure, "consistency": again}[exit_score]
    threshold = (sorted(confidence)[0] + sorted(confidence)[1]) / 2
    answers, samples = answer(threshold, left_pad(prompts))
    for row, own in enumerate(confidence):
        exits = own >= threshold
        assert torch.equal(answers[row], small[row] if exits else large[row])
        assert samples[row].guide.answered == exits
        assert sum(samples[row].llm_tokens) == 0 if exits else min(samples[row].llm_tokens) > 0
        assert samples[row].generated_tokens == 3
        assert samples[row].prompt_tokens == prompts[row]["input_ids"].shape[1]
        assert len(samples[row].guide.passes) == (1 if exit_score == "confidence" else 2)
        assert samples[row].guide.confidence == pytest.approx(sure[row], rel=1e-4)
        if exit_score != "confidence":
            assert samples[row].guide.consistency == pytest.approx(again[row], rel=1e-3)
    everyone, samples = answer(1e-30, left_pad(prompts))
    assert torch.equal(everyone, torch.stack(small))
    cost = cm.flops(random_llava.config, samples[0])
    assert cost.total == cost.overhead > 0


@torch.no_grad()
def test_sgl_early_exit_with_beams_composed_with_neurons(random_llava, small_guide, prompts):
    guided = cm.build_method("sgl", guide=small_guide, keep=0.5, early_exit=1e-30)
    with cm.compose(guided, cm.build_method("core_neurons", keep=0.5))(random_llava) as trace:
        greedy(random_llava, left_pad(prompts[:2]), num_beams=2)
        assert [sample.guide.answered for sample in trace.drain()] == [True, True]
        with pytest.raises(cm.UserError, match="leave return_dict_in_generate out"):
            greedy(random_llava, prompts[0], return_dict_in_generate=True)
    spared = cm.build_method("sgl", guide=small_guide, keep=0.5, early_exit=1.0)
    with cm.compose(spared, cm.build_method("core_neurons", keep=0.5))(random_llava) as trace:
        greedy(random_llava, left_pad(prompts[:2]), num_beams=2)
    assert [sample.guide.answered for sample in trace.samples] == [False] * 4
    assert {len(neurons) for sample in trace.samples for neurons in sample.neurons} == {24}


def confidence_of(guide, prompt, answer):
    """Geometric mean of the answer's token probabilities, with the image token ruled out as in its generation."""
    whole = torch.cat([prompt["input_ids"], answer[None]], 1)
    inputs = {**prompt, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
    logits = guide(**inputs).logits[0, -len(answer) - 1 : -1]
    logits[:, 99] = -torch.inf
    return float(logits.softmax(-1).gather(1, answer[:, None]).log().mean().exp())


def rescored(guide, prompt, answer, keep):
    """Consistency by hand: prune the guide before layer 0 by its own scores, multiply the answer's probabilities."""
    whole = torch.cat([prompt["input_ids"], answer[None]], 1)
    inputs = {**prompt, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
    visual = (whole[0] == 99).nonzero()[:, 0]
    attention = torch.stack(eager_attention(guide, inputs))[:, 0].sum((0, 1))
    score = attention[int(visual[-1]) : -1, visual].sum(0)
    kept = score.topk(int(keep * len(visual))).indices
    hidden = torch.ones(whole.shape[1], dtype=torch.bool)
    hidden[visual] = False
    hidden[visual[kept]] = True
    embeds = guide.get_input_embeddings()(whole)
    features = torch.cat(guide.model.get_image_features(prompt["pixel_values"]).pooler_output)
    embeds[0, visual] = features
    positions = torch.arange(whole.shape[1])[hidden]
    states = guide.model.language_model(inputs_embeds=embeds[:, hidden], position_ids=positions[None]).last_hidden_state
    probabilities = guide.lm_head(states)[0, -len(answer) - 1 : -1].softmax(-1)
    return float(probabilities.gather(1, answer[:, None]).prod())


def test_sgl_refuses_a_guide_with_another_grid(random_llava, tmp_path):
    config = random_llava.config.__class__(**random_llava.config.to_dict())
    config.vision_config.image_size = 56
    random_llava.__class__(config).save_pretrained(tmp_path)
    with pytest.raises(cm.UserError, match=r"16 visual tokens.*64"):
        cm.build_method("sgl", guide=str(tmp_path))(random_llava).__enter__()


# ---------------------------------------------------------------------------------------------------------- parameters
@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("sparsevlm", {"version": "3"}, r"version='3'.*1.5, 2.0"),
        ("sparsevlm", {"keep": 100}, r"keep=100.*192, 128, 96, 64"),
        ("sparsevlm", {"schedule": "depth"}, r"schedule='depth'.*rank"),
        ("sparsevlm", {"schedule": "rank", "version": "2.0"}, r"schedule='rank'.*2.0"),
        ("sparsevlm", {"schedule": [1, 2]}, r"schedule=\[1, 2\]"),
        ("pyramiddrop", {"keeps": [0.5]}, r"keeps=\[0.5\]"),
        ("pyramiddrop", {"keeps": [0.5, 0.2, 1.5]}, r"keeps=1.5"),
        ("topv", {"recover": 1.0}, r"recover=1.0"),
        ("topv", {"epsilon": 0}, r"epsilon=0"),
        ("topv", {"feature": "manhattan"}, r"feature='manhattan'.*cosine"),
        ("topv", {"central_weight": -1}, r"central_weight=-1"),
        ("topv", {"terms": "squared"}, r"terms='squared'.*normalised, raw"),
        ("sgl", {"layer_fraction": 1.0}, r"layer_fraction=1.0"),
        ("sgl", {"early_exit": 0}, r"early_exit=0"),
        ("sgl", {"exit_score": "sum"}, r"exit_score='sum'.*mean, confidence, consistency"),
        ("sgl", {"observers": "all"}, r"observers='all'.*last_visual, after_image"),
    ],
)
def test_bad_parameters_are_named(name, parameters, message):
    with pytest.raises(cm.UserError, match=message):
        cm.build_method(name, **parameters)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("sparsevlm", {}, r"layers=6 .*3 to 4"),
        ("sparsevlm", {"layers": [0, 1, 2]}, r"keep=192 keeps 300 tokens.*64"),
        ("sparsevlm", {"version": "2.0", "layers": [0, 1, 2], "schedule": [9, 8, 7]}, r"priority_heads=14.*1 to 4"),
        ("sparsevlm", {"layers": [0, 1]}, r"keep=192 needs 3 layers"),
        ("pyramiddrop", {}, r"layers=8.*0 to 5"),
        ("pyramiddrop", {"layers": [3, 2], "keeps": [0.5, 0.4]}, r"layers=2.*4 to 5"),
        ("topv", {"layer": 5, "keep": 9}, r"layer=5.*0 to 4"),
        ("topv", {"keep": 65}, r"keep=65.*64"),
        ("sgl", {"guide": "nowhere"}, r"unknown model 'nowhere'"),
    ],
)
def test_parameters_that_do_not_fit_the_model_are_named(name, parameters, message, random_llava):
    with pytest.raises(cm.UserError, match=message):
        cm.build_method(name, **parameters)(random_llava).__enter__()
