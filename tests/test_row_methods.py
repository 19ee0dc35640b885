"""Methods that choose KV rows before each decode step, against slow and obvious references."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import left_pad, make_prompt
from hypothesis import given
from hypothesis import strategies as st

import corematching as cm
from corematching.methods.actqkv import Statistics, share_of
from corematching.methods.attention_predictor import BUNDLED, load_weights, predict, predict_flops
from corematching.methods.base import ReadRows
from corematching.methods.pod import lowest_layers, similarity


class Layer:
    """One layer of one sample with queries and keys of our choice; ``at`` shows a decode step, or the prompt."""

    scaling = 8**-0.5

    def __init__(self, prompt=60, steps=30, heads=4, kv_heads=2, layer=0, seed=0, visual=range(5, 40)):
        generator = torch.Generator().manual_seed(seed)
        total = prompt + steps
        self.all_queries = torch.randn(heads, total, 8, generator=generator) * 2
        self.all_keys = torch.randn(kv_heads, total, 8, generator=generator)
        self.all_values = torch.randn(kv_heads, total, 8, generator=generator)
        self.prompt, self.layer, self.memory = prompt, layer, {}
        self.others = {layer: self}
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
    def values(self):
        return self.all_values[:, : self.rows]

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


# --------------------------------------------------------------------------------------------------------------- ActQKV
def layers_of(count, **kwargs):
    """Several layers of one sample, with one memory."""
    layers = [Layer(layer=number, seed=number, **kwargs) for number in range(count)]
    for layer in layers:
        layer.memory = layers[0].memory
        layer.others = dict(enumerate(layers))
    return layers


class ActReference:
    """One layer as SEED tells it: everything anew in every step, row by row."""

    def __init__(self, layer, first, last, size):
        self.layer, self.first, self.last, self.size = layer, first, last, size
        self.received = [[0.0] * 400 for _ in range(4)]
        self.blocks, self.entropies = [], []
        for query in range(layer.prompt):
            self.receive(query)
        self.complete(layer.prompt)

    def receive(self, query):
        near = list(range(max(0, query - self.last + 1), query + 1))
        for head in range(4):
            logits = [self.dot(head, query, key) for key in near]
            total = sum(math.exp(logit) for logit in logits)
            for key, logit in zip(near, logits, strict=True):
                self.received[head][key] += math.exp(logit) / total

    def dot(self, head, query, key):
        return float(self.layer.all_queries[head, query] @ self.layer.all_keys[head // 2, key]) * 8**-0.5

    def complete(self, rows):
        while self.first + (len(self.blocks) + 1) * self.size + self.last <= rows:
            start = self.first + len(self.blocks) * self.size
            parts = []
            for head in range(4):
                own = sorted(range(start, start + self.size), key=lambda row: -self.received[head][row])[:4]
                parts.append(self.layer.all_keys[head // 2, own].mean(0))
            self.blocks.append(torch.cat(parts))

    def scores(self, probe):
        return [float(probe @ block / (probe.norm() * block.norm())) for block in self.blocks]

    def entropy(self, scores):
        weights = [math.exp(score) for score in scores]
        chances = [weight / sum(weights) for weight in weights]
        return -sum(p * math.log(p) for p in chances) / math.log(len(chances))


def act_weights(queries, history):
    """Weights of probe queries [T, C] by squared distance to the mean of all queries so far in units of variance."""
    mean, variance = history.mean(0), history.var(0)
    bias = [((query - mean) ** 2 / (variance + variance.mean() / 100)).mean() for query in queries]
    return torch.stack(bias) / sum(bias)


@pytest.mark.parametrize("probe", [1, 3])
def test_actqkv_reads_what_the_rules_say(probe):
    first, last, size, warm_up, count = 4, 8, 6, 3, 3
    layers = layers_of(count, prompt=60)
    parameters = {"keep": 32, "first": first, "last": last, "block": size, "least": 2, "warm_up": warm_up}
    method = cm.build_method("actqkv", **parameters, probe=probe)
    for layer in layers:
        method.begin(layer.at())
    reference = [ActReference(layer, first, last, size) for layer in layers]
    mean_blocks = (32 - first - last) // size
    for step in range(25):
        left, found = count * mean_blocks, []
        for number, own in enumerate(reference):
            view, query = own.layer.at(step), own.layer.prompt + step
            latest = own.layer.all_queries[:, max(own.layer.prompt, query - probe + 1) : query + 1].transpose(0, 1)
            latest = latest.flatten(1)
            before = own.layer.all_queries[:, :query].transpose(0, 1).flatten(1)
            weights = act_weights(latest, before) if probe > 1 else torch.ones(1)
            if probe > 1 and step:  # windows count alike, so a step's query weighs as much as the prompt: below
                weights = method_weights(own.layer, latest, step)
            scores = own.scores((weights[:, None] * latest).sum(0))
            own.entropies.append(own.entropy(scores))
            means = [sum(each.entropies) / len(each.entropies) if step >= warm_up else 1 for each in reference[number:]]
            blocks = [len(each.blocks) for each in reference[number:]]
            wanted = round(left * means[0] / sum(means))
            chosen = max(min(wanted, 2 * mean_blocks, blocks[0]), min(2, blocks[0]))
            left -= chosen
            best = sorted(range(len(scores)), key=lambda block: -scores[block])[:chosen]
            rows = {row for block in best for row in range(first + block * size, first + (block + 1) * size)}
            rows |= set(range(first)) | set(range(first + len(scores) * size, view.rows))
            assert read_sets(method.choose(view), view.rows) == [rows] * 2, (step, number)
            own.receive(query)
            own.complete(view.rows)
            found.append(chosen)
        assert sum(found) == count * mean_blocks, "budgets sum to the total"


def test_actqkv_layers_with_more_spread_scores_get_more_blocks():
    left, found, entropies = 30, [], [0.5, 1.0, 0.75]
    for layer in range(3):
        found.append(share_of(left, entropies[layer:], [2] * (3 - layer), [20] * (3 - layer)))
        left -= found[-1]
    assert found == [7, 13, 10]  # 30 * .5 / 2.25 = 6.7; 23 * 1 / 1.75 = 13.1; the rest


def method_weights(layer, latest, step):
    """Statistics of the prompt as one window, then of every decoded query as one that counts as much."""
    window = layer.all_queries[:, : layer.prompt].transpose(0, 1).flatten(1)
    found = Statistics.of(window)
    for query in range(layer.prompt, layer.prompt + step):
        found = found.followed_by(layer.all_queries[:, query].flatten()[None])
    return found.weights(latest)


def test_actqkv_statistics_of_equal_windows_are_those_of_all_tokens():
    windows = torch.randn(5, 16, 6) * 3 + 1
    found = Statistics.of(windows[0])
    for window in windows[1:]:
        found = found.followed_by(window)
    torch.testing.assert_close(found.mean, windows.flatten(0, 1).mean(0))
    torch.testing.assert_close(found.variance, windows.flatten(0, 1).var(0))
    queries = torch.randn(3, 6)
    torch.testing.assert_close(found.weights(queries), act_weights(queries, windows.flatten(0, 1)))


@given(
    layers=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=12),
    place=st.floats(0, 1),
)
def test_actqkv_budgets_sum_to_the_total_within_their_bounds(layers, place):
    entropies = [entropy for entropy, _, _ in layers]
    least = [low for _, low, _ in layers]
    most = [low + more for _, low, more in layers]
    left = total = round(sum(least) + place * (sum(most) - sum(least)))
    for layer in range(len(layers)):
        own = share_of(left, entropies[layer:], least[layer:], most[layer:])
        assert least[layer] <= own <= most[layer]
        left -= own
    assert left == 0, f"of {total}"


# --------------------------------------------------------------------------------------------------- AttentionPredictor
def official_net(weights):
    """The net as SEED tells it, of torch's modules."""
    net = torch.nn.ModuleDict(
        {
            "first": torch.nn.Conv2d(1, 16, 3, padding=1),
            "second": torch.nn.Conv2d(16, 32, 3, padding=1),
            "third": torch.nn.Conv1d(32, 1, 1),
        }
    )
    for name, part in net.items():
        part.weight.data = weights[f"{name}.weight"].reshape(part.weight.shape)
        part.bias.data = weights[f"{name}.bias"]

    def run(history):
        x = net["first"](history[:, None]).relu()
        x = torch.nn.functional.adaptive_avg_pool2d(net["second"](x).relu(), (1, None))[:, :, 0]
        return net["third"](x)[:, 0]

    return run


@torch.no_grad()
def test_attention_predictor_reads_the_best_predicted_blocks():
    size, first, last, history, every = 4, 4, 6, 8, 3
    layer = Layer(prompt=45)
    parameters = {"keep": 26, "first": first, "last": last, "block": size, "history": history, "every": every}
    method = cm.build_method("attention_predictor", **parameters)
    net = official_net(load_weights(BUNDLED))
    method.begin(layer.at())

    def pooled(row):
        return [max(row[start : start + size]) for start in range(0, len(row), size)]

    past = [[pooled(layer.row(query)[head].tolist()) for query in range(45 - history, 45)] for head in range(4)]
    for step in range(15):
        view = layer.at(step)
        candidates = (view.rows - first - last) // size
        net_in = torch.zeros(4, history, candidates)
        for head in range(4):
            for when, row in enumerate(past[head][-history:]):
                own = row[first // size :][:candidates]
                net_in[head, when, : len(own)] = torch.tensor(own)
        scores = net(net_in).unflatten(0, (2, 2)).amax(1)
        expected = []
        for own in scores.tolist():
            best = sorted(range(candidates), key=lambda block: -own[block])[: (26 - first - last) // size]
            rows = {row for block in best for row in range(first + block * size, first + (block + 1) * size)}
            expected.append(rows | set(range(first)) | set(range(first + candidates * size, view.rows)))
        assert read_sets(method.choose(view), view.rows) == expected, step
        for head in range(4):
            if (step + 1) % every == 0:
                row = layer.at(step).row(view.rows - 1)[head]
            else:
                read = torch.tensor(sorted(expected[head // 2]))
                row = torch.zeros(view.rows)
                row[read] = layer.row(view.rows - 1, torch.stack([read] * 2))[head]
            past[head].append(pooled(row.tolist()))


@torch.no_grad()
def test_attention_predictor_keeps_all_while_there_is_little_to_choose_from():
    layer = Layer(prompt=20)
    method = cm.build_method("attention_predictor", keep=14, first=4, last=6, block=4, history=5, predictor="mean")
    method.begin(layer.at())
    assert method.choose(layer.at(0)) is None
    assert method.choose(layer.at(1)) is not None, "22 rows: three blocks, one of which is read"


@torch.no_grad()
def test_attention_predictors_net_is_small_and_its_cost_is_counted():
    from torch.utils.flop_counter import FlopCounterMode

    assert BUNDLED.stat().st_size <= 100_000
    with FlopCounterMode(display=False) as counter:
        predict(load_weights(BUNDLED), torch.rand(3, 8, 10))
    assert predict_flops(3, 8, 10) == counter.get_total_flops()


def test_attention_predictor_training_gains_over_the_untrained_net():
    """On attention whose next row repeats an old one: what only the whole history tells."""
    from corematching.training.attention_predictor import HISTORY, recall, train, untrained

    generator = torch.Generator().manual_seed(0)
    strength = torch.rand(2, 3, 1, 12, generator=generator) ** 4
    traces = [(strength * torch.rand(2, 3, HISTORY + 6, 12, generator=generator)).roll(s, 3) for s in range(4)]
    trained = train(traces[:3], steps=40, batch=8)
    assert recall(trained, traces[3], 0.25) > recall(untrained(0), traces[3], 0.25) + 0.1


# ------------------------------------------------------------------------------------------------------------------ PoD
def test_pod_similarity_is_one_minus_the_divergence_in_bits():
    first, second = torch.tensor([[[0.5, 0.5, 0.0, 0.0]]]), torch.tensor([[[0.0, 0.0, 0.3, 0.7]]])
    assert similarity(first, first).tolist() == pytest.approx([1.0])
    assert similarity(first, second).tolist() == pytest.approx([0.0], abs=1e-6)
    mixed = torch.tensor([[[0.5, 0.25, 0.25, 0.0]]])
    middle = (first + mixed) / 2
    by_hand = sum(
        float(p * math.log2(p / m)) / 2
        for each in (first, mixed)
        for p, m in zip(each.flatten().tolist(), middle.flatten().tolist(), strict=True)
        if p
    )
    assert similarity(first, mixed).tolist() == pytest.approx([1 - by_hand], abs=1e-6)


def test_pod_blocks_grow_from_the_lowest_layer_up():
    similar = [[True, False], [True, True], [False, True], [True, False]]
    assert lowest_layers(similar, 2) == [[0, 0], [0, 1], [0, 1], [3, 1], [3, 4]]


@pytest.mark.parametrize("gate", [1.0, 0.4])
def test_pod_attends_as_the_gate_of_proximal_over_distant_says(gate):
    layers = layers_of(4)
    method = cm.build_method("pod", keep=20, first=3, similar=0.3, gate=gate, observe=5)
    for layer in layers:
        method.begin(layer.at())
    alike = [
        [float(similarity(a.at().attention(5), b.at().attention(5))[2 * h : 2 * h + 2].mean()) >= 0.3 for h in range(2)]
        for a, b in itertools.pairwise(layers)
    ]
    assert any(map(any, alike))
    lowest = lowest_layers(alike, 2)
    skipped = 0
    for step in range(8):
        for number, layer in enumerate(layers):
            view = layer.at(step)
            for other in layers:
                other.at(step)
            decision = method.choose(view)
            index = decision.index if decision else [torch.arange(view.rows)] * 2
            keys = decision.keys if decision else view.keys
            for head in range(4):
                kv, query = head // 2, view.query[head]
                recent = range(view.rows - 17, view.rows)
                proximal = [*range(3), *recent]
                distant = [row for row in range(view.rows) if row not in proximal]
                far = layers[lowest[number][kv]].keys[kv, distant]
                z_near, z_far = ((k @ query * 8**-0.5).exp().sum() for k in (view.keys[kv, proximal], far))
                near = (view.keys[kv, proximal] @ query * 8**-0.5).softmax(0) @ view.values[kv, proximal]
                distance = (far @ query * 8**-0.5).softmax(0) @ view.values[kv, distant]
                g = z_near / (z_near + z_far)
                full = g * near + (1 - g) * distance
                whole = len(index[kv]) == view.rows
                found = (keys[kv] @ query * 8**-0.5).softmax(0) @ view.values[kv, index[kv]]
                torch.testing.assert_close(found, full if whole else near, atol=1e-5, rtol=1e-4)
                if not whole:
                    assert g >= gate
                    skipped += 1
    assert (skipped > 0) == (gate < 1)


# ------------------------------------------------------------------------------------------------------- all of them
@torch.no_grad()
@pytest.mark.parametrize("name", ["refreshkv", "actqkv", "attention_predictor", "pod"])
def test_a_count_beyond_all_rows_is_dense_bit_for_bit(name, random_llava, prompts):
    batch = left_pad(prompts)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    dense = random_llava.generate(**batch, **options)
    with cm.build_method(name, keep=10_000)(random_llava) as trace:
        assert torch.equal(random_llava.generate(**batch, **options), dense)
    for sample in trace.samples:
        assert sample.rows_read == [[sample.rows_held(layer, step) for step in range(11)] for layer in range(6)]


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("refreshkv", {"keep": 0}, r"keep=0 "),
        ("refreshkv", {"every": 0}, r"every=0.*null"),
        ("refreshkv", {"similarity": 1.5}, r"similarity=1.5.*null"),
        ("refreshkv", {"kernel": 2}, r"kernel=2.*odd"),
        ("actqkv", {"block": 0}, r"block=0"),
        ("actqkv", {"keep": 100, "first": 64, "last": 512}, r"first=64 and last=512.*keep=100"),
        ("attention_predictor", {"first": 0.5, "last": 0.5}, r"first=0.5 and last=0.5"),
        ("attention_predictor", {"every": 0}, r"every=0"),
        ("pod", {"gate": 1.5}, r"gate=1.5"),
        ("pod", {"observe": 0}, r"observe=0"),
    ],
)
def test_bad_parameters_are_named(name, parameters, message):
    with pytest.raises(cm.UserError, match=message):
        cm.build_method(name, **parameters)


def test_a_file_that_holds_no_net_is_refused(tmp_path, random_llava):
    (tmp_path / "text.pt").write_text("no net")
    torch.save({"weights": {"first.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    for name, message in (("missing.pt", "cannot be read"), ("text.pt", "cannot be read"), ("other.pt", "another net")):
        method = cm.build_method("attention_predictor", predictor=str(tmp_path / name))
        with pytest.raises(cm.UserError, match=f"{name}.*{message}"), method(random_llava):
            pass
