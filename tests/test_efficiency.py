"""FLOPs against torch's own counter, byte counts, the roofline model, and the efficiency road end to end."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import IMAGE_TOKENS, make_prompt
from torch.utils.flop_counter import FlopCounterMode

import corematching as cm
from corematching import kernels
from corematching.cli import main
from corematching.cost.hardware import load_hardware
from corematching.cost.roofline import Hardware, Sizes, at_depth, decode_bytes, predict
from corematching.efficiency import bench
from corematching.efficiency.ffn_ways import measured_ways
from corematching.efficiency.inputs import fixed_batch, fixed_inputs
from corematching.efficiency.latency import Pair, Run, Spread, decision_seconds, in_turns
from corematching.efficiency.offloaded import ffn_bytes, measure_offloaded, other_bytes, plan
from corematching.efficiency.peaks import Peaks
from corematching.efficiency.rows import Protocol, measure, predicted_rows
from corematching.engine.compiled import generate
from corematching.registry import group_names
from corematching.results.store import Store

PEAKS = Peaks(1e10, 2e10, 1e11)


def traced(model, name, tokens=6, **parameters):
    """(trace of one answer, FLOPs that torch counted)."""
    inputs = make_prompt(1)
    with cm.build_method(name, **parameters)(model) as trace, FlopCounterMode(display=False) as counter:
        generate(model, inputs, tokens)
    (sample,) = trace.drain()
    return sample, counter.get_total_flops()


# Methods whose default layers lie beyond the tiny model's, and one that needs a guide.
ON_TINY = {
    "corematching_release": {"first_layer": 2, "last_layer": 8},
    "pyramiddrop": {"layers": (3, 6, 9)},
    "sparsevlm": {"layers": (2, 4, 6)},
    "vtc_cls": {"layer": 3},
    "focusllava": {"router": "packaged:routers/tiny_focusllava.pt", "layer": 6},
    "as_vit": {"layers": (2, 3, 4), "thresholds": (1e-6, 5e-5, 5e-5)},
    "sgl": {"guide": "tiny"},
}


@pytest.fixture(scope="module")
def tiny():
    return cm.load_model("tiny", device="cpu")[0]


@pytest.fixture(scope="module", autouse=True)
def peaks_measured_once():
    """The first run measures this machine's peaks, which takes seconds; later ones find the same."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bench, "measure_peaks", cache(bench.measure_peaks))
        yield


@pytest.mark.parametrize("name", [name for name in group_names("method") if name != "cdpruner"])
def test_flops_are_within_a_thousandth_of_torchs_count(name, tiny):
    inputs = fixed_inputs(tiny)
    with cm.build_method(name, **ON_TINY.get(name, {}))(tiny) as trace, FlopCounterMode(display=False) as counter:
        generate(tiny, inputs, 3)
    booked = cm.flops(tiny.config, trace)
    assert booked.total == pytest.approx(counter.get_total_flops(), rel=0.001)


def test_sizes_count_the_models_parameters(random_llava):
    counted = sum(parameter.numel() for parameter in random_llava.parameters())
    small = sum(p.numel() for p in random_llava.parameters() if p.dim() == 1)
    assert Sizes.of(random_llava.config).total == pytest.approx(counted - small, rel=0.02)


def test_decode_bytes_follow_neurons_and_kv(random_llava):
    config = random_llava.config
    dense, _ = traced(random_llava, "dense")
    ours, _ = traced(random_llava, "core_neurons", keep=0.5)
    saved = decode_bytes(config, dense, 4, 5) - decode_bytes(config, ours, 4, 5)
    assert saved == 6 * 3 * 32 * 24 * 4, "half of 48 neurons in six layers, three rows of 32 float32 each"
    fewer, _ = traced(random_llava, "fastv", keep=10)
    assert decode_bytes(config, dense, 4, 5) - decode_bytes(config, fewer, 4, 5) == dense.kv_bytes - fewer.kv_bytes
    masked = replace(ours, ffn_mode="masked")
    assert decode_bytes(config, masked, 4, 5) == decode_bytes(config, dense, 4, 5)


def test_steps_before_gathering_are_charged_whole(random_llava):
    ours, _ = traced(random_llava, "core_neurons", keep=0.5)
    late = replace(ours, masked_steps=2)
    more = cm.flops(random_llava.config, late).decode - cm.flops(random_llava.config, ours).decode
    assert more == pytest.approx(2 * 6 * 6 * 32 * 24)


def test_every_hardware_profile_predicts(random_llava):
    sample, _ = traced(random_llava, "dense")
    profiles = [load_hardware(name) for name in group_names("hardware") if name != "this"]
    assert {profile.name.split()[0] for profile in profiles} == {"NVIDIA"}
    times = {hardware.name: predict(random_llava.config, sample, hardware, "float16") for hardware in profiles}
    assert times["NVIDIA H200 SXM"].decode_per_token < times["NVIDIA Titan Xp"].decode_per_token
    found = predicted_rows(random_llava.config, sample, sample, [1, 32], load_hardware("titan_xp"))
    assert {row["predicted"] for row in found.rows.values()} == {True}
    assert {row["dtype"] for row in found.rows.values()} == {"float16"}, "a card has its own type"
    assert {row["kv_bytes"] for row in found.rows.values()} == {sample.kv_bytes // 2}, "the trace was made in float32"
    assert {row["paired_speedup"] for row in found.rows.values()} == {1.0}
    assert found.rows[1]["decode_ms_per_token"] is None
    assert "from_layers" not in found.rows[32]
    with pytest.raises(cm.UserError, match=r"unknown hardware 'gtx'.*titan_xp"):
        load_hardware("gtx")
    with pytest.raises(cm.UserError, match="dtype='bfloat16' has no peak on NVIDIA Titan Xp"):
        load_hardware("titan_xp").rate("bfloat16")


def test_a_tight_memory_makes_dense_pay_the_link_for_every_token(random_llava):
    config, sizes = random_llava.config, Sizes.of(random_llava.config)
    dense, _ = traced(random_llava, "dense")
    ours, _ = traced(random_llava, "core_neurons", keep=0.4)
    ffn = sizes.neuron * sizes.ffn_width * 4
    memory = sizes.total * 4 + dense.dense_kv_bytes - 1.2 * ffn
    card = Hardware("toy", {"float32": 1e15}, bandwidth=1e12, memory=memory, link=1e6)
    slow, fast = (predict(config, sample, card, "float32") for sample in (dense, ours))
    assert (slow.regime, fast.regime) == ("offloaded", "offloaded")
    assert slow.decode_per_token == pytest.approx(slow.streamed_per_token / 1e6)
    assert slow.streamed_per_token % ffn == 0
    assert fast.streamed_per_token == 0
    assert fast.decode_per_token < slow.decode_per_token / 100
    assert predict(config, dense, replace(card, memory=1e12), "float32").regime == "resident"


def test_runs_alternate_and_share_one_prompt(random_llava):
    inputs = fixed_inputs(random_llava, before=5, after=7)
    assert inputs["input_ids"].shape == (1, 5 + IMAGE_TOKENS + 7)
    pair = in_turns(
        random_llava, cm.build_method("dense"), cm.build_method("fastv", keep=8), inputs, [1, 3], 2, "eager"
    )
    assert len(pair.dense) == len(pair.method) == 2
    for run in (*pair.dense, *pair.method):
        assert run.trace.decode_steps == 2
        assert 0 < run.prefill == run.end_to_end[1] < run.end_to_end[3]
        assert run.peak_bytes > 0
    assert pair.method[0].trace.kv_lengths[-1] == 5 + 8 + 7


def test_ratios_are_taken_pair_by_pair(random_llava):
    sample, _ = traced(random_llava, "dense")
    runs = [Run(seconds, {1: seconds, 3: 2 * seconds}, sample, 1, "eager") for seconds in (1.0, 10.0, 2.0, 30.0)]
    pair = Pair(dense=[runs[0], runs[1]], method=[runs[2], runs[3]])
    assert pair.speedup(3) == Spread.of([1 / 2, 10 / 30])
    assert runs[0].decode_per_token(3) == 0.5
    assert runs[0].decode_per_token(1) is None


def test_rows_hold_what_the_tables_need(random_llava):
    inputs = fixed_inputs(random_llava)
    protocol = Protocol(output_tokens=(1, 3), repeats=2)
    method = cm.build_method("corematching", threshold="keep", keep=10)
    measured = measure(random_llava, cm.build_method("dense"), method, inputs, protocol, PEAKS)
    one, three = measured.rows[1], measured.rows[3]
    assert "decode_ms_per_token" not in one
    assert three["end_to_end_ms"] > three["prefill_ms"]
    assert three["overhead_ms"] > 0
    assert three["decode_gb_per_s"] == pytest.approx(
        three["decode_bytes_per_token"] / three["decode_ms_per_token"] / 1e6
    )
    assert three["bandwidth_share"] == pytest.approx(three["decode_gb_per_s"] * 1e9 / PEAKS.bandwidth)
    assert three["byte_limit_decode_speedup"] > 1
    prefill = three["prefill_predicted_over_measured"] * three["prefill_ms"]
    decode = three["decode_predicted_over_measured"] * three["decode_ms_per_token"]
    whole = three["predicted_over_measured"] * three["end_to_end_ms"]
    assert prefill + 2 * decode == pytest.approx(whole)
    assert three["kv_bytes"] == measured.trace.kv_bytes < measured.trace.dense_kv_bytes


def test_decisions_are_timed_one_by_one(random_llava, predictor_file):
    seconds = decision_seconds(random_llava, cm.build_method("corematching"), fixed_inputs(random_llava), repeats=2)
    assert [(len(one.prefill), len(one.decoding)) for one in seconds] == [(1, 6), (1, 6)], (
        "one layer drops tokens; six choose neurons, when decoding starts"
    )
    with_predictor = cm.build_method("dejavu", keep=0.3, predictor=predictor_file)
    (one,) = decision_seconds(random_llava, with_predictor, fixed_inputs(random_llava), repeats=1)
    assert (len(one.prefill), len(one.decoding)) == (0, 6), "six layers predict for the token"


def test_measuring_the_ways_leaves_the_ffn_as_it_was(random_llava, monkeypatch, tmp_path):
    mlp = random_llava.model.language_model.layers[0].mlp
    monkeypatch.setenv("CM_CACHE", str(tmp_path))
    x = torch.randn(1, 4, 32)
    with torch.no_grad():
        before = mlp(x)
        assert measured_ways(mlp, 0.5) == "gathered at once, by rule", "it fits into the cache"
        assert torch.equal(mlp(x), before)
        monkeypatch.setattr(kernels, "CACHED_BYTES", 0)
        told = measured_ways(mlp, 0.5)
        assert "in place" in told
        assert "gathering" in told
        assert torch.equal(mlp(x), before)


def test_memory_limited_rows_count_what_was_streamed(random_llava):
    inputs = fixed_inputs(random_llava)
    length = inputs["input_ids"].shape[1]
    budget = other_bytes(random_llava, length, 3) + 5.2 * ffn_bytes(random_llava)
    dense, ours = cm.build_method("dense"), cm.build_method("core_neurons", keep=0.4)
    assert plan(random_llava, dense, budget, length, 3) == 3
    assert plan(random_llava, ours, budget, length, 3) == 1
    protocol = Protocol(output_tokens=(1, 3), repeats=1)
    found = {
        method.name: measure_offloaded(random_llava, method, inputs, protocol, PEAKS, budget)
        for method in (dense, ours)
    }
    streamed = {name: measured.streamed_bytes for name, measured in found.items()}
    one, three = (found["core_neurons"].rows[length] for length in (1, 3))
    assert (three["engine"], three["dense_engine"]) == ("compiled", "eager")
    assert three["regime"].startswith("offloaded")
    assert "streamed_bytes" not in one
    roomy = measure_offloaded(random_llava, ours, inputs, protocol, PEAKS, 1e9)
    assert roomy.rows[3]["regime"] == "resident within 1 GB"
    # Dense: three FFNs in each of three passes, less what a staging buffer happens to hold already.
    assert streamed["dense"] == pytest.approx(9 * ffn_bytes(random_llava), abs=ffn_bytes(random_llava))
    assert streamed["core_neurons"] == 5 * ffn_bytes(random_llava)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": "fast"}, "engine='fast'"),
        ({"repeats": 0}, r"repeats=\[0\]"),
        ({"output_tokens": ()}, r"output_tokens=\[\]"),
        ({"output_tokens": (1.5,)}, r"output_tokens=\[1.5\]"),
    ],
)
def test_wrong_protocols_are_refused(values, message):
    with pytest.raises(cm.UserError, match=message):
        Protocol(**values)


def test_the_efficiency_road_stores_rows_and_resumes(tmp_path: Path, capsys):
    words = [
        "+experiment=efficiency",
        "model=tiny",
        "model.num_layers=3",
        f"results_dir={tmp_path}",
        "hardware=titan_xp",
    ]
    words += ["methods=[dense,{name: core_neurons, keep: 0.4}]", "keep=[]"]
    words += ["efficiency.output_tokens=[1,3]", "efficiency.repeats=1"]
    assert main(words) == 0
    assert "measured peaks" in capsys.readouterr().out
    records = [json.loads(path.read_text()) for path in (tmp_path / "efficiency" / "cells").glob("*/cell.json")]
    assert len(records) == 2 * 2 * 2, "two methods, two lengths, measured and predicted"
    assert {record["kind"] for record in records} == {"efficiency"}
    predicted = [record for record in records if record["bench"]["predicted"]]
    assert {record["labels"]["model"] for record in predicted} == {"tiny"}
    assert {record["bench"]["from_layers"] for record in predicted} == {3}
    assert {len(record["trace"]["visual_tokens_by_layer"]) for record in predicted} == {12}
    measured = [record for record in records if not record["bench"]["predicted"]]
    assert {record["labels"]["model"] for record in measured} == {"tiny (3 layers)"}
    assert {record["bench"]["device"] for record in predicted} == {"NVIDIA Titan Xp"}
    assert len(predicted) == 4
    assert main(words) == 0
    again = capsys.readouterr().out
    assert "0 to measure" in again
    assert "predicted from 3 layers" in (tmp_path / "efficiency" / "table.md").read_text()
    assert main([*words, "hardware.bandwidth=1e9"]) == 0
    assert "2 to measure" in capsys.readouterr().out, "a card with other figures is another prediction"


def test_a_slice_predicts_what_the_whole_model_would(random_llava):
    whole, _ = traced(random_llava, "corematching", layer=2, threshold="keep", keep=10)
    part = replace(
        whole,
        **{name: getattr(whole, name)[:4] for name in ("visual_tokens", "llm_tokens", "kv_lengths", "neurons")},
        kv_bytes=sum(whole.kv_lengths[:4]) * whole.kv_bytes // sum(whole.kv_lengths),
        dense_kv_bytes=whole.dense_kv_bytes * 4 // 6,
        overhead_flops=600,
    )
    config = copy.deepcopy(random_llava.config)
    config.text_config.num_hidden_layers = 4
    config, guess = at_depth(config, part, 6)
    assert (guess.kv_bytes, guess.dense_kv_bytes) == (whole.kv_bytes, whole.dense_kv_bytes)
    assert guess.overhead_flops == 900
    assert cm.flops(config, guess) == cm.flops(random_llava.config, replace(whole, overhead_flops=900))
    assert at_depth(config, guess, 6) == (config, guess)
    found = predicted_rows(config, part, part, [8], load_hardware("h100"), depth=6)
    assert found.rows[8]["from_layers"] == 4
    assert found.rows[8]["kv_bytes"] == whole.kv_bytes // 2, "float16 there, float32 here"


def test_a_row_another_process_measures_is_left_to_it(tmp_path: Path, capsys):
    words = ["+experiment=efficiency", "model=tiny", "model.num_layers=1", f"results_dir={tmp_path}"]
    words += ["methods=[dense,random]", "keep=[8]", "efficiency.output_tokens=[1]", "efficiency.repeats=1"]
    assert main(words) == 0
    capsys.readouterr()
    store = Store(tmp_path / "efficiency")
    records = {path.parent: json.loads(path.read_text()) for path in store.cells.glob("*/cell.json")}
    (taken,) = [folder for folder, record in records.items() if record["labels"]["method"] == "random"]
    shutil.rmtree(taken)
    with store.claim(taken.name) as mine:
        assert mine
        assert main(words) == 0
        assert not taken.exists()
    assert "random keep=8: being measured by another process" in capsys.readouterr().out
    assert main(words) == 0
    assert taken.exists()


def test_wrong_efficiency_settings_take_one_line(tmp_path: Path, capsys):
    words = ["+experiment=efficiency", "model=tiny", f"results_dir={tmp_path}", "efficiency.repeats=none"]
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_method_that_fails_leaves_a_failed_cell_and_the_others_go_on(tmp_path: Path, capsys, monkeypatch):
    def fail(model, dense, method, *rest):
        if method.name == "random":
            raise MemoryError("too large")
        return measure(model, dense, method, *rest)

    monkeypatch.setattr(bench, "measure", fail)
    words = ["+experiment=efficiency", "model=tiny", "model.num_layers=1", f"results_dir={tmp_path}"]
    words += ["methods=[random,dense]", "keep=[8]", "efficiency.output_tokens=[1]", "efficiency.repeats=1"]
    assert main(words) == 1
    assert "random failed: MemoryError: too large" in capsys.readouterr().out
    records = [json.loads(path.read_text()) for path in (tmp_path / "efficiency" / "cells").glob("*/cell.json")]
    status = {record["labels"]["method"]: record["status"] for record in records}
    assert status == {"random": "failed", "dense": "done"}
    assert any("too large" in record["error"]["traceback"] for record in records if record["error"])


CARRIED = """
import runpy, sys
for absent in ("pandas", "datasets", "lmms_eval", "wandb", "matplotlib", "rich", "pyarrow", "scipy"):
    sys.modules[absent] = None
sys.argv = ["bench_gpu.py", "--dry-run"]
runpy.run_path("scripts/bench_gpu.py", run_name="__main__")
"""


def test_the_gpu_script_runs_dry_with_little_more_than_torch():
    """As on a GPU box that the source was carried to: torch, transformers and hydra-core."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", CARRIED], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "dry run complete" in done.stdout
    assert "core-neuron FFN (rows " in done.stdout


def test_a_batch_is_of_prompts_that_differ(random_llava):
    one, three = fixed_batch(random_llava, 1), fixed_batch(random_llava, 3)
    assert all(torch.equal(three[name][:1], one[name]) for name in one)
    assert not torch.equal(three["input_ids"][0], three["input_ids"][1])
    method = cm.build_method("corematching")
    protocol = Protocol(output_tokens=(1, 3), repeats=1, batch=(3,))
    found = measure(random_llava, cm.build_method("dense"), method, three, protocol, PEAKS)
    kept = {len(sample.visual_tokens[-1]) for sample in found.samples}
    neurons = {tuple(sample.neurons[0].tolist()) for sample in found.samples}
    assert len(found.samples) == 3
    assert len(kept) > 1, "prompts keep different numbers of tokens"
    assert len(neurons) == 3, "and have neurons of their own"
    row = found.rows[3]
    assert row["batch"] == 3
    assert row["tokens_per_s"] == pytest.approx(9 / row["end_to_end_ms"] * 1e3)
    assert row["flops"] == pytest.approx(cm.flops(random_llava.config, found.samples).total)
    assert row["kv_bytes"] == sum(sample.kv_bytes for sample in found.samples)


def test_a_batch_reads_weights_once(random_llava):
    config = random_llava.config
    sample, _ = traced(random_llava, "dense")
    single, double = (decode_bytes(config, [sample] * count, 4, 5) for count in (1, 2))
    rows = sample.kv_bytes + 6 * 3 * sample.dense_kv_bytes // (6 * sample.prompt_tokens)
    assert single == decode_bytes(config, sample, 4, 5)
    assert double - single == rows
    card = Hardware("toy", {"float32": 1e9}, bandwidth=1e15, memory=1e12, link=1e9)
    alone, both = (predict(config, [sample] * count, card, "float32", 5) for count in (1, 2))
    assert both.decode_per_token == pytest.approx(2 * alone.decode_per_token), "bound by arithmetic"


def test_batches_are_blocks_of_the_table_and_single_prompts_the_cells_they_were(tmp_path: Path):
    words = ["+experiment=efficiency", "model=tiny", "model.num_layers=2", f"results_dir={tmp_path}"]
    words += ["methods=[dense,{name: fastv, layer: 1}]", "keep=[16]", "efficiency.output_tokens=2"]
    words += ["efficiency.repeats=1"]
    assert main(words) == 0
    single = {path.name for path in (tmp_path / "efficiency" / "cells").iterdir()}
    assert main([*words, "efficiency.batch=[1,3]"]) == 0
    (beside,) = [path.parent for path in tmp_path.glob("efficiency-*/table.md")]
    cells = {path.name for path in (beside / "cells").iterdir()}
    assert single < cells, "single prompts are the cells that they are without a batch"
    assert len(cells) == 2 * len(single)
    table = (beside / "table.md").read_text()
    assert table.count("resident, batch 3") >= 2
    assert "tokens/s" in table
