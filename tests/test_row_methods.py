"""Methods that choose KV rows before each decode step, against slow and obvious references."""

from __future__ import annotations

import pytest
import torch
from conftest import make_prompt

import corematching as cm
from corematching.methods.base import ReadRows


class Layer:
    """One layer of one sample with queries and keys of our choice; ``at`` shows a decode step, or the prompt."""

    scaling = 8**-0.5

    def __init__(self, prompt=60, steps=30, heads=4, kv_heads=2, layer=0, seed=0, visual=range(5, 40)):
        generator = torch.Generator().manual_seed(seed)
        total = prompt + steps
        self.all_queries = torch.randn(heads, total, 8, generator=generator) * 2
        self.all_keys = torch.randn(kv_heads, total, 8, generator=generator)
        self.prompt, self.layer, self.memory = prompt, layer, {}
        self.visual, self.groups = visual, heads // kv_heads
        self.spent = self.read = 0.0

    def at(self, step=None):
        """The view of a step; None: the prompt."""
        self.step = step
        self.rows = self.prompt if step is None else self.prompt + step + 1
        return self

    @property
    def length(self):
        return self.prompt

    @property
    def keys(self):
        return self.all_keys[:, : self.rows]

    @property
    def query(self):
        return self.all_queries[:, self.rows - 1]

    unrotated_query = query

    @property
    def question_length(self):
        return self.prompt - max(self.visual) - 1

    @property
    def visual_mask(self):
        mask = torch.zeros(self.prompt, dtype=torch.bool)
        mask[list(self.visual)] = True
        return mask

    def queries(self, last):
        return self.all_queries[:, self.prompt - last : self.prompt]

    unrotated_queries = queries

    def keys_of(self, layer):
        return self.others[layer].keys

    def attention(self, what=None):
        if self.step is None:
            return torch.stack([self.row(self.prompt - what + i) for i in range(what)], 1)
        return self.row(self.rows - 1, what)

    def row(self, query, index=None):
        """Attention of one query to the rows up to it (or to some), head by head."""
        rows = []
        for head, own in enumerate(self.all_queries[:, query]):
            keys = self.all_keys[head // self.groups, : query + 1]
            if index is not None:
                keys = keys[index[head // self.groups]]
            weights = (keys @ own * self.scaling).softmax(0)
            rows.append(torch.nn.functional.pad(weights, (0, 0 if index is not None else self.rows - query - 1)))
        return torch.stack(rows)

    def spend(self, flops, read=0.0):
        self.spent += flops
        self.read += read


def read_sets(decision, rows):
    """Per KV head: the rows read."""
    if decision is None:
        return [set(range(rows))] * 2
    assert isinstance(decision, ReadRows)
    for own in decision.index:
        assert len(set(own.tolist())) == len(own), "no row is read twice"
    return [set(own.tolist()) for own in decision.index]


# ------------------------------------------------------------------------------------------------------------ RefreshKV
def refreshkv_reference(layer, steps, most, every, similarity, kernel):
    """SEED: top-K of the pooled attention of the last token, evict the least, full step where queries differ."""

    def best(attention):
        chosen = []
        for head in range(2):
            scores = torch.stack([attention[2 * head], attention[2 * head + 1]]).amax(0).tolist()
            reach = kernel // 2
            pooled = [max(scores[max(0, i - reach) : i + reach + 1]) for i in range(len(scores))]
            order = torch.tensor(pooled).topk(min(most, len(pooled))).indices.tolist()
            chosen.append([(pooled[i], i) for i in order])
        return chosen

    small = best(layer.at().row(layer.prompt - 1))
    last_query = layer.all_queries[:, layer.prompt - 1].mean(0)
    for step in range(steps):
        own = layer.prompt + step
        query = layer.all_queries[:, own].mean(0)
        alike = torch.nn.functional.cosine_similarity(query, last_query, dim=0)
        if every and (step + 1) % every == 0 and (every == 1 or similarity is None or alike < similarity):
            small, last_query = best(layer.at(step).row(own)), query
            yield [set(range(own + 1))] * 2
            continue
        yield [{i for _, i in rows} | {own} for rows in small]
        for rows in small:
            rows.append((float("inf"), own))  # what was decoded since has no score and leaves last
            if len(rows) > most:
                rows.remove(min(rows, key=lambda entry: entry[0]))


@pytest.mark.parametrize(("every", "similarity"), [(1, 0.9), (4, None), (3, 0.3), (3, -1.0), (None, 0.9)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_refreshkv_reads_what_the_rules_say(every, similarity, kernel):
    layer = Layer(seed=kernel)
    method = cm.build_method("refreshkv", keep=12, every=every, similarity=similarity, kernel=kernel)
    method.begin(layer.at())
    reference = refreshkv_reference(Layer(seed=kernel), 30, 12, every, similarity, kernel)
    for step, expected in enumerate(reference):
        view = layer.at(step)
        found = read_sets(method.choose(view), view.rows)
        if kernel == 1:  # pooling makes plateaus of equal scores, of which any may leave first
            assert found == expected, step
        assert [len(own) for own in found] == [len(own) for own in expected], step
        if step == 0:
            assert found == expected


@torch.no_grad()
def test_refreshkv_every_step_is_dense_and_never_is_the_prompts_choice(random_llava):
    prompt = make_prompt(6)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    dense = random_llava.generate(**prompt, **options)
    with cm.build_method("refreshkv", keep=9, every=1)(random_llava):
        assert torch.equal(random_llava.generate(**prompt, **options), dense)
    with cm.build_method("refreshkv", keep=9, every=None)(random_llava) as trace:
        random_llava.generate(**prompt, **options)
    assert trace.samples[0].rows_read == [[10.0] * 11] * 6
    layer = Layer()
    method = cm.build_method("refreshkv", keep=12, every=None)
    method.begin(layer.at())
    chosen = read_sets(method.choose(layer.at(0)), 61)
    for step in range(1, 12):
        for own, first in zip(read_sets(method.choose(layer.at(step)), 0), chosen, strict=True):
            assert {row for row in own if row < 60} <= first, "old rows are the prompt's choice"


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("refreshkv", {"keep": 0}, r"keep=0 "),
        ("refreshkv", {"every": 0}, r"every=0.*null"),
        ("refreshkv", {"similarity": 1.5}, r"similarity=1.5.*null"),
        ("refreshkv", {"kernel": 2}, r"kernel=2.*odd"),
    ],
)
def test_bad_parameters_are_named(name, parameters, message):
    with pytest.raises(cm.UserError, match=message):
        cm.build_method(name, **parameters)
