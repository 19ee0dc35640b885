"""CoreMatching against a slow, obvious reference: sets in plain Python, from the paper's definitions."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from conftest import make_prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import corematching as cm
from corematching.methods.core import match_counts, sentence_core_neurons, token_core_neurons
from corematching.methods.selection import elbow_keep


def reference_token_core(activation, rho):
    positive = sorted((value for value in activation if value > 0), reverse=True)
    if not positive:
        return set()
    limit = positive[max(1, math.floor(rho * len(positive) + 1e-9)) - 1]
    return {n for n, value in enumerate(activation) if value > 0 and value >= limit}


def reference_sentence_core(activations, rho, beta):
    width = len(activations[0])
    votes = [0] * width
    for activation in activations:
        for neuron in reference_token_core(activation, rho):
            votes[neuron] += 1
    by_votes = sorted(range(width), key=lambda n: (-votes[n], n))
    return set(by_votes[: max(1, int(width * beta + 1e-9))])


def reference_core_tokens(activations, visual, core, strict=False):
    match = {i: len({n for n, value in enumerate(activations[i]) if value > 0} & core) for i in visual}
    curve = sorted(match.values(), reverse=True)
    run, drop = len(curve) - 1, curve[-1] - curve[0]
    # Distance of (rank, value) to the chord from the first to the last point, times the chord's (constant) length.
    distance = [abs(drop * rank - run * (value - curve[0])) for rank, value in enumerate(curve)]
    elbow = curve[distance.index(max(distance))]
    return {i for i in visual if match[i] > elbow or (match[i] == elbow and not strict)}


values = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0])
matrices = hnp.arrays(
    "float32", st.tuples(st.integers(2, 12), st.integers(1, 16)), elements=st.one_of(values, st.floats(-4, 4, width=16))
)


@settings(max_examples=150, deadline=None)
@given(matrices, st.sampled_from([0.1, 0.2, 0.5, 1.0]), st.sampled_from([0.1, 0.4, 0.75, 1.0]))
def test_core_neurons_and_core_tokens_match_the_reference(array, rho, beta):
    activations = torch.from_numpy(array)[None]
    rows = array.tolist()
    token_core = token_core_neurons(activations, rho)
    assert [set(row.nonzero()[:, 0].tolist()) for row in token_core[0]] == [
        reference_token_core(row, rho) for row in rows
    ]

    count = max(1, int(array.shape[1] * beta + 1e-9))
    everyone = torch.ones(1, array.shape[0], dtype=torch.bool)
    core = sentence_core_neurons(token_core, everyone, count)
    expected = reference_sentence_core(rows, rho, beta)
    assert set(core[0].tolist()) == expected

    visual = range(array.shape[0] // 2, array.shape[0])
    scores = match_counts(activations[:, visual.start :], core)
    for strict in (False, True):
        kept = elbow_keep(scores, torch.ones_like(scores, dtype=torch.bool), strict)
        found = {visual.start + i for i in kept[0].nonzero()[:, 0].tolist()}
        assert found == reference_core_tokens(rows, visual, expected, strict)
    assert elbow_keep(scores, torch.ones_like(scores, dtype=torch.bool)).any()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=10), st.integers(0, 4))
def test_elbow_ignores_padding(scores, padding):
    alone = torch.tensor([scores], dtype=torch.float32)
    padded = torch.cat([alone, torch.full((1, padding), 99.0)], 1)
    valid = torch.arange(len(scores) + padding)[None] < len(scores)
    expected = elbow_keep(alone, torch.ones_like(alone, dtype=torch.bool))
    assert torch.equal(elbow_keep(padded, valid)[:, : len(scores)], expected)
    assert not elbow_keep(padded, valid)[:, len(scores) :].any()


@torch.no_grad()
@pytest.mark.parametrize("seed", [3, 4])
def test_what_the_model_keeps_is_what_the_reference_keeps(seed, random_llava):
    """The whole way through the engine: activations of the real layers, decisions from the reference."""
    seen: dict[int, torch.Tensor] = {}

    def note(index, module, args):
        seen.setdefault(index, args[0][0])  # prefill comes first

    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(partial(note, index))
        for index, layer in enumerate(random_llava.model.language_model.layers)
    ]
    prompt = make_prompt(seed)
    try:
        with cm.build_method("corematching", layer=2, rho=0.2, beta=0.4)(random_llava) as trace:
            random_llava.generate(**prompt, max_new_tokens=2, do_sample=False, eos_token_id=None)
    finally:
        for hook in hooks:
            hook.remove()
    sample = trace.samples[0]
    visual = (prompt["input_ids"][0] == 99).nonzero()[:, 0].tolist()
    core = reference_sentence_core(seen[1].tolist(), 0.2, 0.4)
    kept = reference_core_tokens(seen[1].tolist(), visual, core)
    assert {visual[i] for i in sample.visual_tokens[2].tolist()} == kept
    assert 0 < len(kept) < 64
    for layer, activations in seen.items():
        assert set(sample.neurons[layer].tolist()) == reference_sentence_core(activations.tolist(), 0.2, 0.4)


@pytest.mark.parametrize(
    ("scores", "kept", "above"),
    [
        ([5, 5, 5, 5], 4, 0),  # flat: nothing tells them apart
        ([3], 1, 0),
        ([4, 3, 2, 1], 1, 0),  # a straight line: every point lies on the chord, the first wins
        ([7, 7, 7, 7, 7, 0], 5, 0),  # the elbow is the end of the upper plateau
        ([9, 1, 1, 1, 1, 0], 5, 1),
        ([math.nan, 8, 8, 0, math.nan], 2, 0),
        ([math.nan, math.nan], 2, 0),
    ],
)
def test_the_elbow_keeps_a_token_at_least(scores, kept, above):
    row = torch.tensor([scores])
    valid = torch.ones_like(row, dtype=torch.bool)
    assert int(elbow_keep(row, valid).sum()) == kept
    assert int(elbow_keep(row, valid, strict=True).sum()) == above


@torch.no_grad()
@pytest.mark.parametrize("threshold", ["elbow", "elbow_release"])
@pytest.mark.parametrize("beta", [0.01, 0.05, 0.4, 1.0])
def test_some_core_token_stays_whatever_beta(threshold, beta, random_llava):
    with cm.build_method("core_tokens", threshold=threshold, beta=beta)(random_llava) as trace:
        for seed in range(3):
            random_llava(**make_prompt(seed))
    assert min(len(sample.visual_tokens[-1]) for sample in trace.samples) > 0


@torch.no_grad()
def test_the_releases_threshold_leaves_out_the_elbow(random_llava):
    def kept(threshold):
        with cm.build_method("core_tokens", threshold=threshold)(random_llava) as trace:
            random_llava(**make_prompt(4))
        return set(trace.samples[0].visual_tokens[-1].tolist())

    assert kept("elbow_release") < kept("elbow")
