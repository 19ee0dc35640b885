"""The machine decides by measurement how chosen neurons are computed; the compiled kernel computes what they mean."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from torch import nn

import corematching as cm
from corematching import kernels
from corematching.engine import ffn, ways
from corematching.engine.ways import Plan, Timings, decide
from corematching.kernels import native

EPYC = Timings(masked=27e-3, gathered=11.7e-3, gather=16.3e-3, in_place=11.2e-3)
"""An AMD EPYC with two cores: torch reads rows in place as fast as gathered ones."""
XEON = Timings(masked=17.3e-3, gathered=6.9e-3, gather=16.2e-3, in_place=11.4e-3)
"""An Intel Xeon with AMX and two cores: in place torch reads at half the rate."""
BARE = Timings(masked=9.4e-3, gathered=5.2e-3, gather=8.0e-3)
"""bfloat16 without a compiler: nothing reads rows in place."""


def test_each_processor_gets_its_own_way():
    assert decide(EPYC) == Plan("in_place")
    assert decide(XEON) == Plan("in_place", gather_after=4, repaid_after=4)
    assert decide(BARE) == Plan("masked", gather_after=2, repaid_after=2)
    assert decide(Timings(33e-3, 11.7e-3, 16.3e-3, 11.2e-3, native=8.7e-3)) == Plan("native")
    assert decide(Timings(9e-3, 12e-3, 1e-3, 11e-3, 10e-3)) == Plan("masked"), "where dense is fastest, dense it is"


def spent(plan: Plan, timings: Timings, steps: int, most: int | None) -> float:
    """Seconds that an answer takes that ends after so many steps, of most that it may have."""
    total, gathered = 0.0, False
    for step in range(steps):
        left = float("inf") if most is None else most - step
        after = plan.gather_after
        if not gathered and after is not None and step >= after and left >= plan.repaid_after:
            gathered, total = True, total + timings.gather
        total += timings.gathered if gathered else getattr(timings, plan.before)
    return total


@pytest.mark.parametrize(
    "timings",
    [
        EPYC,
        XEON,
        *(
            Timings(1.0, gathered, gather, in_place, native)
            for gathered, gather, in_place, native in product((0.3, 0.6), (0.2, 3.0), (0.5, 0.99), (None, 0.45, 1.2))
        ),
    ],
)
def test_no_answer_length_is_slower_than_dense(timings):
    plan = decide(timings)
    for most in (None, 3, 200):
        for steps in range(1, most or 200):
            assert spent(plan, timings, steps, most) <= steps * timings.masked * (1 + 1e-9)
    long = min(timings.gathered, timings.in_place or 9, timings.native or 9)
    waiting = (plan.gather_after or 0) * timings.masked
    assert spent(plan, timings, 2000, None) <= 1.05 * 2000 * long + timings.gather + waiting


class FFN(nn.Module):
    """A gated FFN, stored neuron by neuron."""

    def __init__(self, width: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate_proj, self.up_proj = (nn.Linear(hidden, width, bias=False, dtype=dtype) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(width, hidden, bias=False, dtype=dtype), nn.SiLU()
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            linear.weight.data = torch.randn(linear.weight.shape, generator=generator).to(dtype) / 8
        self.down_proj.weight.data = self.down_proj.weight.data.t().contiguous().t()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def reference(mlp, index, x):
    """The definition, in float64."""
    gate, up, down = (weight.double() for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight))
    mask = torch.zeros(len(gate), dtype=torch.double).index_fill(0, index, 1.0)
    x = x.double()
    return (mlp.act_fn(x @ gate.t()) * (x @ up.t()) * mask) @ down.t()


needs_a_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler")


@needs_a_compiler
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("count", [0, 1, 3, 61, 96])
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 1, 64), (2, 4, 64)])
@torch.no_grad()
def test_the_compiled_kernel_computes_the_definition(dtype, tolerance, count, shape):
    mlp, x = FFN(96, 64, dtype), torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    index = torch.randperm(96, generator=torch.Generator().manual_seed(2))[:count].sort().values
    answer = kernels.chosen_ffn(mlp, index, x, "native")
    expected = reference(mlp, index, x)
    assert answer.dtype == dtype
    assert torch.allclose(answer.double(), expected, atol=tolerance * (1 + float(expected.abs().max())), rtol=tolerance)


@needs_a_compiler
@torch.no_grad()
def test_the_compiled_kernel_reads_chosen_rows_only_and_repeats_exactly():
    mlp, x, index = FFN(96, 64, torch.float32), torch.randn(2, 1, 64), torch.tensor([3, 4, 20, 95])
    first = kernels.chosen_ffn(mlp, index, x, "native")
    for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.t()):
        weight[torch.ones(96, dtype=torch.bool).index_fill(0, index, False)] = torch.nan
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(kernels.chosen_ffn(mlp, index, x, "native"), first)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def measurable(monkeypatch, tmp_path):
    """An FFN that counts as worth measuring, and an empty cache."""
    monkeypatch.setattr(kernels, "CACHED_BYTES", 0)
    monkeypatch.setattr(ways, "WORTH_MEASURING", 0)
    monkeypatch.setenv("CM_CACHE", str(tmp_path))
    ways._read.cache_clear()
    yield FFN(96, 64, torch.float32)
    ways._read.cache_clear()


@torch.no_grad()
def test_a_machine_is_measured_once_and_remembered(measurable, monkeypatch, tmp_path):
    found = ways.measured(measurable, 40)
    assert found.in_place > 0
    assert found.gather > 0
    (key,) = json.loads((tmp_path / "ffn_ways.json").read_text())
    assert f"torch {torch.__version__}" in key
    assert "float32, 38 of 96 x 64" in key, "shares are measured in twentieths"
    monkeypatch.setattr(ways, "measure", lambda *_: pytest.fail("measured again"))
    ways._read.cache_clear()
    assert ways.measured(measurable, 39) == found
    (tmp_path / "ffn_ways.json").write_text("{")
    ways._read.cache_clear()
    monkeypatch.setattr(ways, "measure", lambda *_: XEON)
    assert ways.measured(measurable, 39) == XEON, "a damaged file is measured anew"


@pytest.mark.parametrize("timings", [EPYC, XEON, Timings(33e-3, 11.7e-3, 16.3e-3, 11.2e-3, native=8.7e-3)])
@torch.no_grad()
def test_whatever_was_measured_the_numbers_are_the_same(measurable, timings, monkeypatch):
    if timings.native and native.library() is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(ways, "measure", lambda *_: timings)
    index, x = torch.arange(0, 76, 2), torch.randn(1, 1, 64)
    chosen = ffn.FFNBuilder()(measurable, index[None])
    plan = decide(timings)
    for step in range(7):
        assert torch.allclose(chosen(x).double(), reference(measurable, index, x), atol=1e-5)
        gathered = chosen.rows is not None and chosen.rows.owner is chosen.key
        assert gathered == (plan.gather_after is not None and step >= plan.gather_after)
    assert chosen.masked_steps == 0
    short = ffn.FFNBuilder()(measurable, index[None])
    short.most_steps = 7
    for _ in range(7):
        short(x)
    assert short.rows is None or short.rows.owner is not short.key, "of seven steps too few are left after four"


@pytest.mark.parametrize("way", ["native", "in_place", "gathered", "masked"])
@torch.no_grad()
def test_a_way_can_be_ordered(measurable, way, monkeypatch):
    if way == "native" and native.library() is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(ways, "measure", lambda *_: pytest.fail("measured though a way was ordered"))
    index, x = torch.arange(38), torch.randn(1, 1, 64)
    chosen = ffn.FFNBuilder(way=way)(measurable, index[None])
    assert torch.allclose(chosen(x).double(), reference(measurable, index, x), atol=1e-5)
    assert chosen.masked_steps == (way == "masked")
    with pytest.raises(cm.UserError, match=r"ffn='fast' is not possible here: choose from auto"):
        ffn.FFNBuilder(way="fast")(measurable, index[None])


def test_without_a_compiler_torch_does_it(measurable, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    assert kernels.ways(measurable) == ("in_place",)


@pytest.mark.parametrize("pays", [True, False])
@torch.no_grad()
def test_a_batch_is_computed_over_the_union_of_its_neurons_where_that_is_faster(measurable, pays, monkeypatch):
    if native.library() is None:
        pytest.skip("no C compiler")
    asked = []
    timings = Timings(2.0, 1.0, 1.0, native=1.0 if pays else 3.0)
    monkeypatch.setattr(ways, "measure", lambda mlp, count, tokens: asked.append((count, tokens)) or timings)
    index, x = torch.tensor([[1, 2, 3], [2, 3, 60], [9, 10, 11]]), torch.randn(3, 1, 64)
    chosen = ffn.FFNBuilder()(measurable, index)
    assert isinstance(chosen, ffn.GroupedFFN) == pays
    assert asked == [(4, 3)], "seven neurons of 96 are one twentieth"
    for row in range(3):
        assert torch.allclose(chosen(x)[row].double(), reference(measurable, index[row], x[row]), atol=1e-5)
    chosen.take(torch.tensor([2, 0]))
    for row, was in enumerate((2, 0)):
        assert torch.allclose(chosen(x[:2])[row].double(), reference(measurable, index[was], x[row]), atol=1e-5)
    longer = torch.randn(2, 3, 64)
    assert torch.allclose(chosen(longer)[1].double(), reference(measurable, index[0], longer[1]), atol=1e-5)
    assert chosen.mode == "masked"
