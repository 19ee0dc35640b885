"""Neuron methods: selections by hand, predictors, decode-time choices, composition."""

from __future__ import annotations

import gc
import importlib.util
import json
import pickle
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import left_pad, make_prompt
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import corematching as cm
from corematching.engine import session
from corematching.engine.ffn import FFNBuilder
from corematching.engine.indices import PackedIndices
from corematching.engine.predictors import TokenwiseFFN, load_predictors, save_predictors
from corematching.engine.views import Ledger
from corematching.methods.base import ChooseNeurons, Method
from corematching.methods.core import token_core_neurons
from corematching.methods.coreinfer import most_counted, token_counts
from corematching.methods.predictor import Predictor, most_active, recall
from corematching.methods.views import FFNView
from corematching.training.predictors import Samples, collect, train_predictor

WIDTH = 48


def greedy(model, inputs, **kwargs):
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, **kwargs}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def ffn_view(activations, lengths=None, down=None) -> FFNView:
    """One layer's prefill with activations of our choice."""
    batch, n, width = activations.shape
    valid = torch.arange(n) >= n - torch.tensor(lengths or [n] * batch)[:, None]
    weight = torch.ones(4, width) if down is None else down
    visual = torch.zeros_like(valid)
    return SimpleNamespace(activations=activations, valid=valid, visual_mask=visual, down_weight=weight)


# ----------------------------------------------------------------------------------------------------------- CoreInfer
def naive_counts(activations, token_keep):
    """The official counting, one token at a time."""
    limit = int(token_keep * int((activations > 0).sum()) / len(activations))
    counts = torch.zeros(activations.shape[1], dtype=torch.long)
    for token in activations:
        for neuron in token.argsort(descending=True)[:limit]:
            counts[neuron] += 1
    return counts


@pytest.mark.parametrize("token_keep", [0.1, 0.4, 1.0])
def test_coreinfer_counts_the_largest_activations_of_every_token(token_keep):
    activations = torch.randn(2, 20, 30, generator=torch.Generator().manual_seed(0))
    valid = ffn_view(activations, [20, 13]).valid
    counts = token_counts(activations, valid, token_keep)
    assert torch.equal(counts[0], naive_counts(activations[0], token_keep))
    assert torch.equal(counts[1], naive_counts(activations[1, 7:], token_keep))


def test_coreinfer_never_keeps_a_neuron_that_nothing_counted():
    counts = torch.tensor([[0, 5, 0, 2, 5, 1], [0, 0, 0, 3, 0, 0]])
    assert most_counted(counts[:1], 3).index.tolist() == [[1, 3, 4]]
    assert most_counted(counts[:1], 6).index.tolist() == [[1, 3, 4, 5]]
    tied = torch.randint(0, 3, (2, 40), generator=torch.Generator().manual_seed(1))
    for row in range(2):
        counted = tied[row].nonzero()[:, 0]
        official = counted[tied[row][counted].argsort(descending=True)[:9]].sort().values
        assert most_counted(tied[row : row + 1], 9).index[0].tolist() == official.tolist()
    lowest = most_counted(tied[:1], 9, "first").index[0]
    twice, once = ((tied[0] == count).nonzero()[:, 0] for count in (2, 1))
    assert lowest.tolist() == torch.cat([twice, once])[:9].sort().values.tolist()
    # In a batch, the shorter row repeats a neuron it has.
    assert most_counted(counts, 6).index.tolist() == [[1, 3, 4, 5], [3, 3, 3, 3]]


# --------------------------------------------------------------------------------------------------------------- Wanda
def test_wanda_multiplies_column_norms_with_activation_norms():
    down = torch.tensor([[1.0, 2.0, 3.0, 0.1], [0.0, 0.0, 4.0, 0.0]])
    activations = torch.tensor([[[9.0, 9, 9, 9], [3.0, 1, 0.1, 50], [-4.0, 1, 0.1, 0]]])
    view = ffn_view(activations, [2], down)
    method = cm.build_method("wanda_neurons", keep=0.5)
    torch.testing.assert_close(method.scores(view)[0], torch.tensor([5.0, 2 * 2**0.5, 5 * 0.02**0.5, 5.0]))
    assert method.select(view).index.tolist() == [[0, 3]]
    magnitude = cm.build_method("wanda_neurons", keep=0.5, score="magnitude")
    assert magnitude.select(view).index.tolist() == [[1, 2]]


@torch.no_grad()
def test_magnitude_keeps_the_same_neurons_for_every_prompt(random_llava):
    def chosen(score, seed):
        with cm.build_method("wanda_neurons", keep=0.2, score=score)(random_llava) as trace:
            greedy(random_llava, make_prompt(seed))
        return [neurons.tolist() for neurons in trace.samples[0].neurons]

    assert chosen("magnitude", 0) == chosen("magnitude", 1)
    assert chosen("wanda", 0) != chosen("wanda", 1)


# --------------------------------------------------------------------------------------------------- random, and votes
@torch.no_grad()
def test_random_neurons_follow_seed_layer_and_prompt_but_not_the_batch(random_llava, prompts):
    def chosen(seed, inputs):
        with cm.build_method("random_neurons", keep=0.25, seed=seed)(random_llava) as trace:
            greedy(random_llava, inputs)
        return [[neurons.tolist() for neurons in sample.neurons] for sample in trace.samples]

    batch = chosen(7, left_pad(prompts))
    assert batch == [own for prompt in prompts for own in chosen(7, prompt)]
    assert all(len(set(layer)) == 12 for sample in batch for layer in sample)
    assert len({tuple(layer) for sample in batch for layer in sample}) == 18
    (other,) = chosen(8, prompts[0])
    assert all(ours != theirs for ours, theirs in zip(batch[0], other, strict=True))
    shares = torch.tensor(
        [neuron for seed in range(9, 29) for layer in chosen(seed, prompts[0])[0] for neuron in layer]
    )
    assert shares.bincount(minlength=WIDTH).min() > 10, "120 choices of a quarter: 30 each on average"


@torch.no_grad()
@pytest.mark.parametrize("name", ["core_neurons", "corematching"])
def test_text_or_the_last_token_alone_may_vote(name, random_llava):
    prompt = make_prompt(6, text=9)
    last = prompt["input_ids"].shape[1] - 1
    share = {"core_neurons": {"keep": 0.25}, "corematching": {"beta": 0.25, "tokens": False}}[name]
    seen = {}
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, i=i: seen.setdefault(i, args[0]))
        for i, layer in enumerate(random_llava.model.language_model.layers)
    ]
    random_llava(**prompt)
    for hook in hooks:
        hook.remove()
    text = [*range(5), *range(5 + 64, last + 1)]
    for voters, tokens in (("all", range(last + 1)), ("text", text), ("last", [last])):
        with cm.build_method(name, **share, rho=0.3, voters=voters)(random_llava) as trace:
            greedy(random_llava, left_pad([prompt, make_prompt(1, text=30)]))
        for layer in range(6):
            votes = token_core_neurons(seen[layer][0, list(tokens)], 0.3).sum(0)
            expected = votes.argsort(descending=True, stable=True)[:12].sort().values
            assert trace.samples[0].neurons[layer].tolist() == expected.tolist(), voters


@torch.no_grad()
def test_who_votes_decides_which_tokens_stay(random_llava):
    def kept(voters):
        with cm.build_method("core_tokens", keep=9, voters=voters, beta=0.2)(random_llava) as trace:
            random_llava(**make_prompt(6))
        return trace.samples[0].visual_tokens[-1].tolist()

    assert kept("all") != kept("text") != kept("last") != kept("all")


# ---------------------------------------------------------------------------------------------------------- predictors
def test_recall_is_the_share_of_active_neurons_found():
    active = torch.tensor([[True, True, False, False]] * 3)
    scores = torch.tensor([[9.0, 8, 1, 0], [9, 0, 8, 1], [0, 1, 8, 9]])
    assert recall(scores, active).tolist() == [1.0, 0.5, 0.0]
    assert most_active(torch.tensor([[0.1, -5.0, 2.0, 0.0]]), 2).tolist() == [[False, True, True, False]]


def test_training_finds_neurons_that_follow_from_the_input():
    generator = torch.Generator().manual_seed(3)
    weight, inputs = (torch.randn(*shape, generator=generator) for shape in ((40, 12), (600, 12)))
    samples = Samples(inputs, torch.relu(inputs @ weight.T))
    predictor, found = train_predictor(samples, keep=0.25, rank=24, steps=300)
    assert found > 0.7
    assert not predictor.relu
    torch.testing.assert_close(predictor(inputs), inputs @ predictor.first.T @ predictor.second.T)
    assert predictor.frequency.sum() == pytest.approx(10, rel=1e-4)
    _, unrelated = train_predictor(Samples(inputs[torch.randperm(600)], samples.activations), 0.25, 24, steps=300)
    assert unrelated < 0.5
    variant, found = train_predictor(samples, keep=0.25, rank=24, steps=300, labels="positive", relu=True)
    assert found > 0.7
    assert variant.relu
    assert torch.equal(variant.frequency, (samples.activations > 0).float().mean(0))


@torch.no_grad()
def test_collecting_leaves_the_model_alone_and_sees_decode_steps(random_llava):
    prompt = make_prompt(3)
    greedy(random_llava, prompt)
    hooks = [len(module._forward_pre_hooks) for module in random_llava.modules()]
    samples = collect(random_llava, [prompt, make_prompt(4)], answer_tokens=3, question_tokens=5)
    assert len(samples) == 6
    assert samples[0].inputs.shape[1] == 32
    assert samples[0].activations.shape[1] == WIDTH
    assert 10 < len(samples[0].inputs) <= 2 * (5 + 2)
    assert [len(module._forward_pre_hooks) for module in random_llava.modules()] == hooks


class Mlp(nn.Module):
    """A gated FFN with biases everywhere."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 20), nn.Linear(8, 20)
        self.down_proj, self.act_fn = nn.Linear(20, 8), nn.SiLU()


@torch.no_grad()
@pytest.mark.parametrize("name", ["dejavu", "powerinfer"])
@pytest.mark.parametrize("batch", [1, 3])
def test_each_token_is_computed_with_its_own_predicted_neurons(name, batch):
    torch.manual_seed(0)
    mlp, state = Mlp(), SimpleNamespace(neurons={}, ffn={}, ledger=Ledger(batch))
    predictor = Predictor(torch.randn(5, 8), torch.randn(20, 5), torch.rand(20))
    parameters = {"keep": 0.5} | ({"hot_fraction": 0.2} if name == "powerinfer" else {})
    (stage, *_) = cm.build_method(name, **parameters).stages(SimpleNamespace(depth=1))
    x = torch.randn(batch, 1, 8)
    answer = TokenwiseFFN(mlp, stage, predictor, FFNBuilder())(x, state)
    scores = predictor(x[:, 0])
    hot = predictor.frequency.topk(4).indices if name == "powerinfer" else torch.tensor([], dtype=torch.long)
    for row in range(batch):
        cold = scores[row].index_fill(0, hot, -torch.inf).topk(10 - len(hot)).indices
        chosen = torch.cat([hot, cold]).sort().values
        assert torch.equal(state.neurons[0][row], chosen)
        mask = torch.zeros(20).index_fill(0, chosen, 1)
        expected = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x[row])) * mlp.up_proj(x[row]) * mask)
        torch.testing.assert_close(answer[row], expected)
    assert state.ledger.flops == [2 * (5 * 8 + 20 * 5)] * batch


@torch.no_grad()
def test_hot_neurons_alone_may_fill_the_budget(random_llava, predictor_file):
    method = cm.build_method("powerinfer", keep=0.25, hot_fraction=0.25, predictor=predictor_file)
    with method(random_llava) as trace:
        greedy(random_llava, make_prompt(0))
        greedy(random_llava, make_prompt(1))
    first, second = ([neurons.tolist() for neurons in sample.neurons] for sample in trace.samples)
    assert first == second
    assert {len(neurons) for neurons in first} == {12}


@torch.no_grad()
def test_choices_change_from_token_to_token(random_llava, predictor_file):
    def last_choice(tokens):
        with cm.build_method("dejavu", keep=0.25, predictor=predictor_file)(random_llava) as trace:
            greedy(random_llava, make_prompt(0), max_new_tokens=tokens)
        return [neurons.tolist() for neurons in trace.samples[0].neurons]

    assert last_choice(2) != last_choice(3)


def test_a_missing_predictor_says_what_to_run(random_llava, tmp_path):
    for file in (None, str(tmp_path / "nothing.safetensors")):
        with pytest.raises(cm.UserError, match=r"predictor=.*scripts/train_predictors.py --model"):
            cm.build_method("dejavu", predictor=file)(random_llava).__enter__()


def test_a_predictor_of_another_model_is_refused(random_llava, tmp_path):
    path = tmp_path / "other.safetensors"
    save_predictors(path, {0: Predictor(torch.zeros(4, 7), torch.zeros(9, 4), torch.zeros(9))}, {})
    with pytest.raises(cm.UserError, match="made for another model"):
        cm.build_method("powerinfer", predictor=str(path))(random_llava).__enter__()


def test_a_predictor_file_that_does_not_say_its_form_is_refused(random_llava, tmp_path):
    path = tmp_path / "old.safetensors"
    save_file({"layers.0.first": torch.zeros(4, 32)}, path)
    with pytest.raises(cm.UserError, match="does not say its form"):
        cm.build_method("dejavu", predictor=str(path))(random_llava).__enter__()


def test_predictor_files_keep_numbers_and_notes(random_llava, tmp_path):
    path = tmp_path / "predictors.safetensors"
    made = {i: Predictor(torch.randn(4, 32), torch.randn(WIDTH, 4), torch.rand(WIDTH)) for i in range(6)}
    save_predictors(path, made, {"recall": json.dumps([0.5] * 6)})
    loaded = load_predictors(str(path), random_llava, random_llava.model.language_model)
    torch.testing.assert_close(loaded[3].second, made[3].second, atol=2e-3, rtol=1e-3)
    assert not loaded[3].relu
    save_predictors(path, {i: replace(own, relu=True) for i, own in made.items()}, {"recall": json.dumps([0.5] * 6)})
    assert load_predictors(str(path), random_llava, random_llava.model.language_model)[5].relu
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["recall"]) == [0.5] * 6


# --------------------------------------------------------------------------------------------------------- composition
@torch.no_grad()
@pytest.mark.parametrize("neurons", ["coreinfer", "wanda_neurons", "random_neurons", "dejavu", "powerinfer"])
@pytest.mark.parametrize("other", ["pyramiddrop", "h2o"])
def test_neuron_methods_join_token_and_kv_methods(neurons, other, random_llava, predictor_file, prompts):
    parameters = {"keep": 0.25}
    if neurons in ("dejavu", "powerinfer"):
        parameters["predictor"] = predictor_file
    if neurons == "powerinfer":
        parameters["hot_fraction"] = 0.1
    first = {"pyramiddrop": {"layers": [2, 4], "keeps": [0.5, 0.1]}, "h2o": {"keep": 15, "recent": 5}}[other]
    method = cm.compose(cm.build_method(other, **first), cm.build_method(neurons, **parameters))
    with method(random_llava) as trace:
        together = greedy(random_llava, left_pad(prompts))
        alone = torch.cat([greedy(random_llava, prompt) for prompt in prompts])
    assert torch.equal(together, alone)
    for sample in trace.samples:
        assert all(0 < len(chosen) <= 12 for chosen in sample.neurons)
        if other == "pyramiddrop":
            assert len(sample.visual_tokens[5]) == int(0.1 * sample.image_tokens)
        else:
            assert sample.kv_lengths == [15] * 6


@torch.no_grad()
def test_three_kinds_compose(random_llava, prompts):
    inner = cm.compose(cm.build_method("fastv", keep=9), cm.build_method("streaming_llm", keep=12))
    with cm.compose(inner, cm.build_method("core_neurons", keep=0.5))(random_llava) as trace:
        greedy(random_llava, prompts[0])
    sample = trace.samples[0]
    assert (len(sample.visual_tokens[-1]), sample.kv_lengths[-1], len(sample.neurons[-1])) == (9, 12, 24)


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ("sparsevlm", "fastv", "tokens"),
        ("sgl", "pyramiddrop", "tokens"),
        ("csp", "streaming_llm", "kv"),
        ("dejavu", "core_neurons", "neurons"),
        ("corematching", "wanda_neurons", "neurons"),
    ],
)
def test_methods_that_reduce_the_same_thing_are_refused(first, second, what):
    with pytest.raises(cm.UserError, match=f"cannot compose '{first}' with '{second}': both reduce {what}"):
        cm.compose(cm.build_method(first), cm.build_method(second))


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("coreinfer", {"keep": 2}, r"keep=2 .*fraction"),
        ("coreinfer", {"token_keep": 0}, r"token_keep=0"),
        ("coreinfer", {"ties": "topk"}, r"ties='topk'.*argsort, first"),
        ("wanda_neurons", {"score": "random"}, r"score='random'.*magnitude"),
        ("random_neurons", {"keep": 40}, r"keep=40 .*fraction"),
        ("random_neurons", {"seed": 2**32}, r"seed=4294967296 .*whole number"),
        ("core_neurons", {"voters": "image"}, r"voters='image'.*all, text, last"),
        ("corematching", {"voters": None}, r"voters=None.*text"),
        ("powerinfer", {"keep": 0.2, "hot_fraction": 0.4}, r"hot_fraction=0.4.*keep=0.2"),
        ("dejavu", {"keep": 1.2}, r"keep=1.2"),
    ],
)
def test_bad_parameters_are_named(name, parameters, message):
    with pytest.raises(cm.UserError, match=message):
        cm.build_method(name, **parameters)


@pytest.mark.slow
def test_the_training_script_reports_recall(tmp_path, capsys):
    path = Path(__file__).parent.parent / "scripts" / "train_predictors.py"
    spec = importlib.util.spec_from_file_location("train_predictors", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    output = tmp_path / "predictors.safetensors"
    assert script.main(["--prompts", "3", "--steps", "20", "--output", str(output)]) == 0
    assert "mean recall" in capsys.readouterr().out
    model, _ = cm.load_model("tiny")
    assert (
        len(load_predictors(str(output), model, model.model.language_model))
        == model.config.text_config.num_hidden_layers
    )


@torch.no_grad()
def test_an_answer_of_one_token_never_chooses(random_llava):
    """Choosing waits for the first decode step, and what it would be chosen from goes with the KV cache."""
    prompt, asked = make_prompt(5), []
    method = cm.build_method("core_neurons", keep=0.5)

    @dataclass(frozen=True)
    class Asked(Method):
        def stages(self, geometry):
            return [ChooseNeurons(s.layer, partial(self.note, s.select)) for s in method.stages(geometry)]

        def note(self, select, view):
            asked.append(view.layer)
            return select(view)

    with Asked()(random_llava) as trace:
        out = random_llava(**prompt, use_cache=True)
        session = random_llava._corematching
        assert asked == []
        assert len(session.undecided) == 1
        assert trace.drain()[0].neurons == [None] * 6
        del out
        gc.collect()
        assert len(session.undecided) == 0
        random_llava(**prompt, use_cache=False)
        assert asked == []
        greedy(random_llava, prompt, max_new_tokens=2)
        assert asked == [0, 1, 2, 3, 4, 5]
        assert [len(neurons) for neurons in trace.drain()[-1].neurons] == [24] * 6


@torch.no_grad()
def test_activations_beyond_the_limit_do_not_wait(random_llava, monkeypatch):
    monkeypatch.setattr(session, "MOST_HELD", 2 * 86 * WIDTH * 4 + 1)
    prompt = make_prompt(5)
    assert prompt["input_ids"].shape[1] <= 86
    with cm.build_method("core_neurons", keep=0.5)(random_llava) as trace:
        early = greedy(random_llava, prompt)
        out = random_llava(**prompt, use_cache=True)
        (waiting,) = random_llava._corematching.undecided.values()
        assert 2 <= len(waiting) < 6
        del out
    monkeypatch.undo()
    with cm.build_method("core_neurons", keep=0.5)(random_llava) as late_trace:
        late = greedy(random_llava, prompt)
    assert torch.equal(early, late)
    assert all(map(torch.equal, trace.samples[0].neurons, late_trace.samples[0].neurons))


def test_traces_hold_neurons_in_a_bit_each_and_give_indices(random_llava):
    with torch.inference_mode(), cm.build_method("core_neurons", keep=0.4)(random_llava) as trace:
        random_llava.generate(**make_prompt(3), max_new_tokens=3, do_sample=False, eos_token_id=None)
        chosen = [random_llava._corematching.current.neurons[layer][0] for layer in range(6)]
    neurons = pickle.loads(pickle.dumps(trace.samples[0].neurons))
    for layer, own in enumerate(chosen):
        assert neurons[layer].dtype == torch.long
        assert torch.equal(neurons[layer], own.sort().values)
    width = random_llava.config.text_config.intermediate_size
    assert sum(map(len, neurons._bits)) <= 6 * (width + 7) // 8


def test_packed_indices_read_like_a_list():
    sets = [torch.tensor([9, 2, 2, 0]), None, torch.tensor([], dtype=torch.long)]
    packed = PackedIndices(sets)
    assert [None if own is None else own.tolist() for own in packed] == [[0, 2, 9], None, []]
    assert packed[-2] is None
    assert [len(own) for own in packed[::2]] == [3, 0]
    assert PackedIndices([None, None]) == [None, None]
    assert len(packed) == 3
