"""KV-cache methods against hand-computed choices and a plain reference; budgets, batches, duplicates."""

from __future__ import annotations

import pytest
import torch
from conftest import left_pad, make_prompt

import corematching as cm
from corematching.methods.kv import attention_received, keep_best

METHODS = {
    "streaming_llm": {"keep": 20},
    "h2o": {"keep": 20, "recent": 6},
    "snapkv": {"keep": 20, "window": 6, "kernel": 3},
    "csp": {"keep": 20, "recent": 6},
}
DEPTH = 6


class FakeView:
    """One layer of one or more samples whose attention is given by queries and keys of our choice."""

    def __init__(self, queries, keys, lengths=None, visual=()):
        self.all_queries, self.keys = queries, keys
        batch, _, n, _ = keys.shape
        self.lengths = lengths or [n] * batch
        self.valid = torch.arange(n) >= n - torch.tensor(self.lengths)[:, None]
        self.visual_mask = torch.zeros(batch, n, dtype=torch.bool)
        self.visual_mask[:, list(visual)] = True
        self.visual_counts = self.visual_mask.sum(1).tolist()
        self.spent = [0.0] * batch

    def queries(self, rows, counts=None):
        return self.all_queries[:, :, rows]

    def spend(self, flops):
        self.spent = [before + more for before, more in zip(self.spent, flops, strict=True)]


def random_view(n=90, heads=4, kv_heads=2, batch=2, lengths=None, visual=range(5, 40), seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(batch, heads, n, 8, generator=generator) * 2
    keys = torch.randn(batch, kv_heads, n, 8, generator=generator)
    return FakeView(queries, keys, lengths, visual)


def full_attention(view, plus_one=False):
    """The whole attention matrix [B, H, n, n], the naive way."""
    keys = view.keys.repeat_interleave(view.all_queries.shape[1] // view.keys.shape[1], dim=1)
    logits = (view.all_queries @ keys.transpose(2, 3)) * view.keys.shape[-1] ** -0.5
    n = logits.shape[-1]
    visible = torch.ones(n, n).tril().bool() & view.valid[:, None, None]
    weights = logits.exp() * visible
    weights = weights / (weights.sum(-1, keepdim=True) + float(plus_one)).clamp(min=1e-30)
    return weights * view.valid[:, None, :, None]


def grouped(per_head, kv_heads):
    return per_head.unflatten(1, (kv_heads, -1)).mean(2)


def kept_sets(decision, row, head):
    index = decision.index[row, head]
    return index.tolist() if decision.valid is None else index[decision.valid[row]].tolist()


@pytest.mark.parametrize("plus_one", [False, True])
def test_chunked_attention_sums_equal_the_full_matrix(plus_one):
    view = random_view(n=150, lengths=[150, 80])
    weights = torch.rand(2, 130, 3) * view.valid[:, -130:, None]
    received = attention_received(view, [130, 80], weights, plus_one)
    full = full_attention(view, plus_one)[:, :, -130:]
    expected = grouped(torch.einsum("bhrn,brg->bhgn", full, weights), 2)
    torch.testing.assert_close(received, expected, atol=1e-5, rtol=1e-4)


def test_streaming_llm_keeps_sinks_and_recent_positions():
    view = random_view(n=30, lengths=[30, 12], visual=range(20, 25))
    decision = cm.build_method("streaming_llm", keep=10).select(view)
    assert kept_sets(decision, 0, 0) == [0, 1, 2, 3, 24, 25, 26, 27, 28, 29]
    assert kept_sets(decision, 1, 1) == [18, 19, 20, 21, 24, 25, 26, 27, 28, 29]
    decision = cm.build_method("streaming_llm", keep=0.5, recent=0.2).select(view)
    assert kept_sets(decision, 0, 0) == [*range(9), *range(24, 30)]
    assert kept_sets(decision, 1, 0) == [18, 19, 20, 21, 28, 29]


def test_h2o_keeps_the_heaviest_and_the_recent():
    view = random_view(lengths=[90, 70])
    decision = cm.build_method("h2o", keep=20, recent=5).select(view)
    received = grouped(full_attention(view).sum(2), 2)
    for row, length in enumerate([90, 70]):
        for head in range(2):
            older = received[row, head].clone()
            older[-5:] = -1
            older[: 90 - length] = -1
            expected = [*sorted(older.topk(15).indices.tolist()), 85, 86, 87, 88, 89]
            assert kept_sets(decision, row, head) == expected


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("ties", ["topk", "first"])
def test_snapkv_smooths_what_the_window_sees(pooling, ties):
    view = random_view(lengths=[90, 70])
    decision = cm.build_method("snapkv", keep=20, window=8, kernel=3, pooling=pooling, ties=ties).select(view)
    seen = grouped(full_attention(view)[:, :, -8:].sum(2), 2)
    for row, length in enumerate([90, 70]):
        for head in range(2):
            older = seen[row, head, 90 - length : -8].tolist()
            padded = [0.0, *older, 0.0]
            triples = zip(padded, padded[1:], padded[2:], strict=False)
            smooth = torch.tensor([sum(t) / 3 if pooling == "avg" else max(t) for t in triples])
            # Max pooling makes plateaus: which of equal scores stay is torch.topk's choice, as officially.
            best = smooth.topk(12).indices if ties == "topk" else smooth.argsort(descending=True, stable=True)[:12]
            best = best + 90 - length
            expected = [*sorted(best.tolist()), *range(82, 90)]
            assert kept_sets(decision, row, head) == expected


def test_ties_are_cut_as_torch_topk_does_or_by_position():
    scores = torch.tensor([[[1.0, 5, 5, 5, 5, 5, 5, 2, 9, 9]], [[7.0, 7, 7, 7, 7, 3, 3, 3, 9, 9]]])
    official = kept_sets(keep_best(scores, [10, 8], [5, 4], [2, 2], "topk"), 0, 0)
    assert official == sorted([*scores[0, 0, :8].topk(3).indices.tolist(), 8, 9])
    alone = keep_best(scores[1:, :, 2:], [8], [4], [2], "topk")
    both = keep_best(scores, [10, 8], [5, 4], [2, 2], "topk")
    assert kept_sets(both, 1, 0) == [position + 2 for position in kept_sets(alone, 0, 0)]
    first = keep_best(scores, [10, 8], [5, 4], [2, 2], "first")
    assert kept_sets(first, 0, 0) == [1, 2, 3, 8, 9]
    assert kept_sets(first, 1, 0) == [2, 3, 8, 9]


# ------------------------------------------------------------------------------------- budgets by layer and head
def pooled_window(view, window, kernel, pooling):
    """[H_kv, n - window] of the first sample: smoothed attention from the window, entry by entry."""
    seen = grouped(full_attention(view)[:1, :, -window:].sum(2), view.keys.shape[1])[0, :, :-window]
    reach = kernel // 2
    padded = torch.nn.functional.pad(seen, (reach, reach))
    stretches = padded.unfold(1, kernel, 1)
    return stretches.mean(2) if pooling == "avg" else stretches.amax(2)


@pytest.mark.parametrize(("keep", "n", "expected"), [
    # base 16, last 16 // 4 = 4, first 28: a step of 24 // 5 = 4 rows
    (24, 90, [36, 32, 28, 24, 20, 16]),
    # first would be more than the 42 there are: 42, last 2 * 24 - 42 = 6, a step of 36 // 5 = 7
    (32, 50, [50, 43, 36, 29, 22, 15]),
    (40, 50, [40] * 6),  # a prompt below twice the base is cut alike everywhere
    (60, 50, [50] * 6),
    (6, 50, [6] * 6),
])  # fmt: skip
def test_pyramidkv_budgets_fall_in_equal_steps(keep, n, expected):
    method = cm.build_method("pyramidkv", keep=keep, window=8, kernel=3, beta=4)
    for layer, count in enumerate(expected):
        view = random_view(n=n, batch=1)
        view.layer = layer
        decision = method.select(view, depth=6)
        if count == n:
            assert decision is None
            continue
        chosen = pooled_window(view, 8, 3, "avg").topk(max(count - 8, 0)).indices
        for head in range(2):
            last = range(n - min(8, count), n)
            assert kept_sets(decision, 0, head) == [*sorted(chosen[head].tolist()), *last]


@pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
def test_adakv_shares_a_layers_budget_among_its_heads(floor):
    view = random_view(n=90, batch=1, kv_heads=4, heads=4)
    view.all_queries[:, 1] *= 4  # one head looks at few positions
    decision = cm.build_method("adakv", keep=20, window=8, kernel=3, pooling="max", floor=floor).select(view)
    scores = pooled_window(view, 8, 3, "max")
    ranking = sorted(((-score, head, i) for head, own in enumerate(scores.tolist()) for i, score in enumerate(own)))
    best = [sum(head == own for _, head, _ in ranking[: 4 * 12]) for own in range(4)]
    counts = decision.valid[0].sum(1) - 8
    assert counts.sum() == 4 * 12, "shares sum to the layer's budget"
    for head, count in enumerate(counts.tolist()):
        assert abs(count - ((1 - floor) * best[head] + floor * 12)) < 1
        kept = decision.index[0, head][decision.valid[0, head]].tolist()
        expected = scores[head].argsort(descending=True, stable=True)[:count].sort().values.tolist()
        assert kept == [*expected, *range(82, 90)]
    assert (len(set(counts.tolist())) == 1) == (floor == 1.0)


@torch.no_grad()
def test_adakv_attends_head_by_head_to_what_each_kept(random_llava, prompts):
    """Against the rectangular cache where heads share evenly; batches as one by one; padding is stored, not read."""
    even, snap = (
        cm.build_method(name, keep=20, window=6, kernel=3, pooling="max", **other)
        for name, other in (("adakv", {"floor": 1.0}), ("snapkv", {"ties": "first"}))
    )
    step = {"input_ids": torch.tensor([[7]])}
    with snap(random_llava):
        expected = _second_step(random_llava, prompts[1], step)
    with even(random_llava):
        found = _second_step(random_llava, prompts[1], step)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with cm.build_method("adakv", keep=20, window=6)(random_llava) as trace:
        together = random_llava.generate(**left_pad(prompts), **options)[:, -5:]
        batch = trace.drain()
        for row, prompt in enumerate(prompts):
            output = random_llava.generate(**prompt, **options, return_dict_in_generate=True)
            assert torch.equal(output.sequences[0, -5:], together[row])
            (alone,) = trace.drain()
            assert (alone.kv_bytes, alone.kv_lengths) == (batch[row].kv_bytes, [20] * DEPTH)
            assert alone.rows_read == batch[row].rows_read == [[21.0, 22.0, 23.0, 24.0]] * DEPTH
            stored = sum(layer.keys.shape[2] - 4 for layer in output.past_key_values.layers)
            assert alone.kv_bytes == stored * random_llava._corematching.kv_row_bytes(4) > 20 * DEPTH * 128
        beams = random_llava.generate(**left_pad(prompts[:2]), **options, num_beams=2)[:, -5:]
        alone = torch.cat([random_llava.generate(**own, **options, num_beams=2)[:, -5:] for own in prompts[:2]])
        assert torch.equal(beams, alone)
        cache = random_llava(**prompts[0], use_cache=True).past_key_values
        with pytest.raises(cm.UserError, match="'adakv' takes no later turns"):
            random_llava(input_ids=torch.tensor([[7, 8]]), past_key_values=cache)


def csp_parts(view, recent, row, head, upto=None):
    """Cross- and within-modality sums of the last ``recent`` queries, entry by entry."""
    attention = grouped(full_attention(view, plus_one=True), 2)[row, head]
    visual = view.visual_mask[row]
    n = len(visual)
    cross, within = torch.zeros(n), torch.zeros(n)
    for query in range(n - recent, n):
        for key in range(n - recent if upto is None else upto):
            part = within if visual[query] == visual[key] else cross
            part[key] += attention[query, key]
    return (cross, within) if upto else (cross[: n - recent], within[: n - recent])


def test_csp_ranks_the_two_parts_apart():
    # The observers span both modalities, so each part has something to say about every key.
    view = random_view(n=60, visual=range(10, 55))
    decision = cm.build_method("csp", keep=30, recent=12, cross_fraction=0.3, deduplicate=True).select(view)
    official = cm.build_method("csp", keep=30, recent=12, cross_fraction=0.3, deduplicate=False).select(view)
    for row in range(2):
        for head in range(2):
            cross, within = csp_parts(view, 12, row, head)
            first = cross.topk(5).indices.tolist()  # int(18 * 0.3)
            again = within.topk(12).indices.tolist()  # int(18 * 0.7)
            assert kept_sets(official, row, head) == [*again, *first, *range(48, 60)]
            own = within.topk(13).indices.tolist()
            cross[own] = -1
            rest = cross.topk(5).indices.tolist()
            assert kept_sets(decision, row, head) == [*own, *rest, *range(48, 60)]


@pytest.mark.parametrize(("bias", "last"), [(0.5, 6), (1.6, 19), (2.5, 30)])
def test_csp_bias_moves_rows_from_the_choice_to_the_end(bias, last):
    """The last 12 * bias positions stay; what is left of 30 is chosen among all others, which 12 observe."""
    view = random_view(n=60, visual=range(10, 55))
    decision = cm.build_method("csp", keep=30, recent=12, cross_fraction=0.3, bias=bias, deduplicate=False).select(view)
    cross, within = (sums[: 60 - last] for sums in csp_parts(view, 12, 1, 0, upto=60 - last))
    first = cross.topk(int((30 - last) * 0.3)).indices.tolist()
    again = within.topk(int((30 - last) * 0.7)).indices.tolist()
    assert kept_sets(decision, 1, 0) == [*again, *first, *range(60 - last, 60)]
    exact = cm.build_method("csp", keep=30, recent=12, bias=bias).select(view)
    assert len(set(kept_sets(exact, 1, 0))) == 30


def test_csp_leaves_prompts_without_an_image_whole():
    view = random_view(n=60, visual=range(10, 55))
    view.visual_mask[0] = False
    view.visual_counts[0] = 0
    decision = cm.build_method("csp", keep=30, recent=12).select(view)
    assert sorted(kept_sets(decision, 0, 1)) == list(range(60))
    assert len(kept_sets(decision, 1, 1)) == 30
    assert cm.build_method("csp", keep=30).select(random_view(n=60, visual=())) is None


def test_csp_without_a_cross_share_has_the_official_constant_or_the_formula():
    view = random_view(n=400, visual=range(10, 350))
    official = cm.build_method("csp", keep=200, recent=40, cross_fraction=0.0, deduplicate=False).select(view)
    assert len(kept_sets(official, 0, 0)) == 308 + 1 + 40
    assert (
        len(set(kept_sets(cm.build_method("csp", keep=200, recent=40, cross_fraction=0.0).select(view), 0, 0))) == 200
    )


def test_csp_leaves_prompts_within_the_budget_whole():
    view = random_view(n=40, lengths=[40, 15], visual=range(28, 34))
    for deduplicate in (True, False):
        decision = cm.build_method("csp", keep=20, recent=6, deduplicate=deduplicate).select(view)
        assert sorted(kept_sets(decision, 1, 0)) == list(range(25, 40))


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_keep_is_met_exactly_in_every_layer(name, random_llava):
    prompt = make_prompt(3, text=20)
    length = prompt["input_ids"].shape[1]
    for keep, recent in ((17, 4), (0.35, 0.1)):
        part = {"streaming_llm": {}, "snapkv": {"window": 4}}.get(name, {"recent": recent})
        with cm.build_method(name, keep=keep, **part)(random_llava) as trace:
            cache = random_llava(**prompt, use_cache=True).past_key_values
        expected = keep if isinstance(keep, int) else int(keep * length)
        assert trace.samples[0].kv_lengths == [expected] * DEPTH
        assert [layer.keys.shape[2] for layer in cache.layers] == [expected] * DEPTH


def test_half_is_recent_by_default():
    view = random_view()
    half = cm.build_method("h2o", keep=20, recent=10).select(view).index
    assert torch.equal(cm.build_method("h2o", keep=20).select(view).index, half)


def test_snapkv_keeps_the_latest_of_its_window_when_the_budget_is_smaller():
    decision = cm.build_method("snapkv", keep=5, window=8).select(random_view())
    assert kept_sets(decision, 1, 0) == [85, 86, 87, 88, 89]


@torch.no_grad()
def test_prefill_is_dense_and_decode_is_not(random_llava):
    prompt = make_prompt(4)
    dense = random_llava(**prompt).logits
    step = {"input_ids": torch.tensor([[7]])}
    dense_step = _second_step(random_llava, prompt, step)
    for name, parameters in METHODS.items():
        with cm.build_method(name, **parameters)(random_llava):
            assert torch.equal(random_llava(**prompt).logits, dense)
            assert not torch.allclose(_second_step(random_llava, prompt, step), dense_step, atol=1e-3)


def _second_step(model, prompt, step):
    cache = model(**prompt, use_cache=True).past_key_values
    return model(**step, past_key_values=cache).logits


@torch.no_grad()
def test_dropping_rows_equals_masking_them(random_llava):
    """A decode step over the cut cache gives what attention restricted to the kept rows gives."""
    prompt = make_prompt(8)
    with cm.build_method("streaming_llm", keep=11)(random_llava):
        short = _second_step(random_llava, prompt, {"input_ids": torch.tensor([[9]])})
    n = prompt["input_ids"].shape[1]
    cache = random_llava(**prompt, use_cache=True).past_key_values
    mask = torch.zeros(1, n + 1, dtype=torch.long)
    mask[:, [0, 1, 2, 3, *range(n - 7, n + 1)]] = 1
    masked = random_llava(
        input_ids=torch.tensor([[9]]), past_key_values=cache, attention_mask=mask, position_ids=torch.tensor([[n]])
    ).logits
    torch.testing.assert_close(short, masked, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_kv_and_token_methods_compose(random_llava, prompts):
    method = cm.compose(cm.build_method("fastv", layer=2, keep=10), cm.build_method("snapkv", keep=16, window=4))
    with method(random_llava) as trace:
        random_llava.generate(**left_pad(prompts), max_new_tokens=3, do_sample=False, eos_token_id=None)
    for sample in trace.samples:
        assert sample.kv_lengths == [min(16, tokens) for tokens in sample.llm_tokens]
        assert [len(layer) for layer in sample.visual_tokens[2:]] == [10] * 4


def test_two_kv_methods_do_not_compose():
    with pytest.raises(cm.UserError, match="both reduce kv"):
        cm.compose(cm.build_method("h2o"), cm.build_method("snapkv"))


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("h2o", {"keep": 0.2, "recent": 0.3}, r"recent=0.3.*keep=0.2"),
        ("snapkv", {"window": 0.5}, r"window=0.5.*count"),
        ("pyramidkv", {"beta": 0}, r"beta=0"),
        ("pyramidkv", {"kernel": 4}, r"kernel=4.*odd"),
        ("adakv", {"floor": 1.5}, r"floor=1.5"),
        ("adakv", {"pooling": "median"}, r"pooling='median'.*avg, max"),
        ("snapkv", {"kernel": 4}, r"kernel=4.*odd"),
        ("snapkv", {"pooling": "median"}, r"pooling='median'.*avg, max"),
        ("csp", {"cross_fraction": 1.5}, r"cross_fraction=1.5"),
        ("csp", {"bias": -1.0}, r"bias=-1.0"),
        ("csp", {"ties": "last"}, r"ties='last'.*topk, first"),
        ("h2o", {"ties": "random"}, r"ties='random'.*topk, first"),
        ("snapkv", {"ties": "argsort"}, r"ties='argsort'.*topk, first"),
        ("streaming_llm", {"keep": 0}, r"keep=0 "),
    ],
)
def test_bad_parameters_are_named(name, parameters, message):
    with pytest.raises(cm.UserError, match=message):
        cm.build_method(name, **parameters)


def test_overhead_is_booked():
    view = random_view(lengths=[90, 40])
    cm.build_method("h2o", keep=20).select(view)
    # Queries by keys, then the sum over queries for two key heads; of the padding, nothing.
    assert view.spent == [2 * n * n * (4 * 8 + 2) for n in (90, 40)]
    view = random_view(lengths=[90, 20])
    cm.build_method("snapkv", keep=20, window=8).select(view)
    assert view.spent == [2 * 8 * 90 * (4 * 8 + 1 + 1), 0], "the second stays whole"
