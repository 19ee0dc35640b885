"""The calibrated prediction from injected measurements, and its measuring on the machine at hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from conftest import make_prompt

import corematching as cm
from corematching.cost.calibration import Calibration, Layer, calibrated
from corematching.cost.roofline import Sizes, kv_bytes_read
from corematching.efficiency import kernels
from corematching.efficiency.inputs import fixed_batch
from corematching.efficiency.peaks import Peaks
from corematching.efficiency.rows import Protocol, measure
from corematching.engine.compiled import generate

NOTHING = Layer((1, 100), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
FREE = Calibration(NOTHING, NOTHING, 1.0, read=1e30, chosen=1e30)


def sample_of(model, name, tokens=6, **parameters):
    with cm.build_method(name, **parameters)(model) as trace:
        generate(model, make_prompt(1), tokens)
    return trace.drain()


def test_times_are_linear_between_rows_and_grow_beyond_the_last():
    layer = Layer((1, 10, 20), (1.0, 10.0, 30.0), (1.0, 2.0, 3.0), (0.0, 0.0, 1.0))
    assert [layer.seconds("products", rows) for rows in (1, 15, 20, 40)] == [1.0, 20.0, 30.0, 60.0]
    assert layer.seconds("attention", 40) == 12.0, "with the square of the rows"
    assert layer.whole(20) == 34.0


def test_every_layer_pays_for_the_rows_that_enter_it(random_llava):
    (dense,), (ours,) = sample_of(random_llava, "dense"), sample_of(random_llava, "fastv", keep=4)
    known = replace(FREE, text=Layer((1, 1000), (1.0, 1000.0), (0.0, 0.0), (0.0, 0.0)))
    for sample in (dense, ours):
        found = calibrated(random_llava.config, [sample], known, 4, 6)
        assert found.prefill == pytest.approx(sum(sample.llm_tokens))
        assert found.decode_per_token == pytest.approx(len(sample.llm_tokens)), "one row per layer"
    both = calibrated(random_llava.config, [dense, ours], known, 4, 6)
    assert both.prefill == pytest.approx(sum(dense.llm_tokens) + sum(ours.llm_tokens))
    assert both.decode_per_token == pytest.approx(2 * len(dense.llm_tokens))


def test_steps_read_chosen_neurons_at_their_own_rate(random_llava):
    (dense,), (ours,) = sample_of(random_llava, "dense"), sample_of(random_llava, "core_neurons", keep=0.5)
    sizes = Sizes.of(random_llava.config)
    one = Layer((1, 1000), (1.0, 1.0), (0.0, 0.0), (0.0, 0.0))
    known = replace(FREE, text=one, chosen=1e3)
    assert calibrated(random_llava.config, [dense], known, 4, 6).decode_per_token == pytest.approx(sizes.depth)
    rest, neurons = sizes.attention / sizes.layer, sizes.ffn_width / 2 * sizes.neuron * 4 / 1e3
    found = calibrated(random_llava.config, [ours], known, 4, 6, decisions=(3.0, 5.0))
    assert found.decode_per_token == pytest.approx(sizes.depth * (rest + neurons) + 1.0), "decisions over five steps"
    assert found.prefill == pytest.approx(sizes.depth + 3.0)
    reading = calibrated(random_llava.config, [dense], replace(FREE, read=10.0), 4, 6)
    assert reading.decode_per_token == pytest.approx((sizes.head * 4 + kv_bytes_read(dense, 5)) / 10)


def test_kernels_are_measured_once_and_rows_show_both_predictions(random_llava, monkeypatch, tmp_path):
    monkeypatch.setenv("CM_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "ROWS", (1, 8))
    known = kernels.calibration_of(random_llava)
    assert list(json.loads((tmp_path / "kernels.json").read_text()))
    monkeypatch.setattr(kernels, "measure", lambda model: pytest.fail("measured again"))
    assert kernels.calibration_of(random_llava) == known
    inputs, dense = fixed_batch(random_llava, 2), cm.build_method("dense")
    protocol = Protocol(output_tokens=(1, 3), repeats=1, batch=(2,))
    row = measure(random_llava, dense, dense, inputs, protocol, Peaks(1e10, 2e10, 1e11), known).rows[3]
    assert row["predicted_over_measured"] > 0
    whole = row["prefill_calibrated_over_measured"] * row["prefill_ms"]
    whole += 2 * row["decode_calibrated_over_measured"] * row["decode_ms_per_token"]
    assert whole == pytest.approx(row["calibrated_over_measured"] * row["end_to_end_ms"])
