"""``model.dtype=auto`` on a processor: float32 for small models, bfloat16 for large ones where it is faster."""

from __future__ import annotations

import json

import pytest

from corematching import groups
from corematching.cost.shapes import Shapes
from corematching.evaluation import dtypes
from corematching.evaluation.dry_run import _bytes, _memory
from corematching.evaluation.experiment import model_identity
from corematching.evaluation.forecast import Forecast


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """A processor that multiplies bfloat16, nothing measured yet."""
    monkeypatch.setenv("CM_CACHE", str(tmp_path))
    monkeypatch.setattr(dtypes, "_flags", lambda: {"avx512f", "avx512_bf16"})
    return tmp_path


@pytest.mark.parametrize(
    ("name", "changes", "faster", "expected"),
    [
        ("llava_1_5_7b", {}, True, "bfloat16"),
        ("llava_1_5_7b", {}, False, "float32"),
        ("llava_1_5_7b", {"num_layers": 4}, True, "float32"),
        ("llava_1_5_7b", {"dtype": "float32"}, True, "float32"),
        ("tiny", {"dtype": "auto"}, True, "float32"),
    ],
)
def test_large_models_take_bfloat16_where_it_is_faster(name, changes, faster, expected, processor, monkeypatch):
    monkeypatch.setattr(dtypes, "bfloat16_is_faster", lambda measure: faster)
    model = {**groups.load("model", name), **changes}
    model |= {"device": "cpu", "weights": "random" if "architecture" in model else "pretrained"}
    assert model_identity(model)["dtype"] == expected


def test_processors_without_it_are_not_asked(processor, monkeypatch):
    monkeypatch.setattr(dtypes, "_flags", lambda: {"avx2"})
    monkeypatch.setattr(dtypes, "bfloat16_is_faster", lambda measure: pytest.fail("measured"))
    assert dtypes.cpu_dtype(groups.load("model", "llava_1_5_7b")) == "float32"


@pytest.mark.parametrize(("half", "expected"), [((0.1, 0.1), True), ((0.1, 3.0), False), ((3.0, 0.1), False)])
def test_both_products_and_reads_must_be_faster_and_are_measured_once(half, expected, processor, monkeypatch):
    asked = []
    monkeypatch.setattr(dtypes, "_seconds", lambda name: asked.append(name) or (half if len(asked) == 1 else (1, 1)))
    assert dtypes.bfloat16_is_faster(measure=False) is False, "a dry run measures nothing"
    assert dtypes.bfloat16_is_faster() is expected
    assert dtypes.bfloat16_is_faster(measure=False) is expected
    assert len(asked) == 2
    assert list(json.loads((processor / "dtypes.json").read_text()).values()) == [expected]


@pytest.mark.parametrize(
    ("dtype", "faster", "element"),
    [("auto", True, 2), ("auto", False, 4), ("float32", True, 4), ("bfloat16", False, 2), ("float16", False, 2)],
)
def test_forecasts_are_of_the_type_that_models_are_loaded_in(dtype, faster, element, processor, monkeypatch):
    monkeypatch.setattr(dtypes, "bfloat16_is_faster", lambda measure: faster and not measure)
    model = {**groups.load("model", "llava_1_5_7b"), "dtype": dtype, "device": "cpu"}
    shapes = Shapes(model["architecture"])
    known = Forecast(model, shapes, rate=1e30, bandwidth=1.0, source="a test", past=())
    assert known.answer_seconds([576.0] * 32, 3) == pytest.approx(2 * shapes.decoder_weights * element)
    assert _memory(known).startswith(f"about {_bytes(shapes.weights * element)} of weights")
