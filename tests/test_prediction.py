"""Predictions from shapes alone, for several cards at once, and the published figures beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import corematching as cm
from corematching.cli import main
from corematching.cost.roofline import in_dtype
from corematching.efficiency.inputs import fixed_inputs
from corematching.efficiency.twin import trace_of_shapes
from corematching.engine.compiled import generate
from corematching.models.checkpoint import random_weights
from corematching.results.aggregate import aggregate
from corematching.results.device_figure import speedup_by_device
from corematching.results.published_speed import load_published_speed

WIDE = {
    "vision_config": {
        "model_type": "clip_vision_model",
        **{"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4},
        **{"image_size": 112, "patch_size": 14},
    },
    "text_config": {
        "model_type": "llama",
        **{"hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "vocab_size": 100},
    },
    "image_token_id": 99,
}
METHODS = {
    "dense": {},
    "fastv": {"keep": 9},
    "corematching": {"threshold": "keep", "keep": 9, "layer": 1},
    "core_neurons": {"keep": 0.4},
    "pyramiddrop": {"layers": (1, 2, 4)},
    "topv": {"keep": 12},
    "dart": {"keep": 12},
    "divprune": {"keep": 12},
    "h2o": {"keep": 20},
}


@pytest.fixture(scope="module")
def wide():
    config = AutoConfig.for_model("llava", **WIDE, vision_feature_layer=-2)
    return random_weights(config, torch.float32, torch.device("cpu"), 0).eval()


@pytest.mark.parametrize("name", METHODS)
def test_a_narrow_twin_leaves_the_trace_that_the_model_leaves(name, wide):
    method = cm.build_method(name, **METHODS[name])
    with method(wide) as trace:
        generate(wide, fixed_inputs(wide, 3, 4), 2)
    real, twin = replace(trace.drain()[0], masked_steps=0), trace_of_shapes(wide.config, method, 3, 4)
    for field in ("llm_tokens", "kv_lengths", "kv_bytes", "dense_kv_bytes", "vision_tokens", "head_positions"):
        assert getattr(twin, field) == getattr(real, field), field
    assert [None if chosen is None else len(chosen) for chosen in twin.neurons] == [
        None if chosen is None else len(chosen) for chosen in real.neurons
    ]
    # What a method scores with may depend on what it has chosen before, hence not on shapes alone.
    assert twin.overhead_flops == pytest.approx(real.overhead_flops, rel=0.02)
    assert cm.flops(wide.config, twin).total == pytest.approx(cm.flops(wide.config, real).total, rel=0.005)
    half = in_dtype(wide.config, twin, "float16")
    assert (half.kv_bytes, half.dense_kv_bytes) == (twin.kv_bytes // 2, twin.dense_kv_bytes // 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Words of a run on two cards, and its folder."""
    from corematching.efficiency import bench

    place = tmp_path_factory.mktemp("predicted")
    words = ["+experiment=paper_hardware", "model=tiny", "hardware=[titan_xp,a100]", f"results_dir={place}"]
    words += ["methods=[dense,fastv,{name: core_neurons, keep: 0.4},corematching]", "prediction.output_tokens=[1,8]"]
    words += ["report=false"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bench, "measure_peaks", None)
        assert main(words) == 0
    return words, place / "paper_hardware"


def test_several_cards_in_one_run_measure_nothing(run, capsys):
    words, folder = run
    records = [json.loads(path.read_text()) for path in folder.glob("cells/*/cell.json")]
    benches = [record["bench"] for record in records]
    assert len(benches) == 4 * 2 * 2
    assert {bench["device"] for bench in benches} == {"NVIDIA Titan Xp", "NVIDIA A100 80GB SXM"}
    assert {(bench["predicted"], bench["dtype"]) for bench in benches} == {(True, "float16")}
    for record in records:
        bench = record["bench"]
        ratios = [bench[f"paired_{part}speedup"] for part in ("", "prefill_", "decode_")]
        ratios += [bench["flops_ratio"], bench["kv_ratio"]]
        assert [ratio is None for ratio in ratios] == [False, False, bench["output_tokens"] == 1, False, False]
        if record["labels"]["method"] == "dense":
            assert {ratio for ratio in ratios if ratio} == {1.0}
        elif record["labels"]["method"] != "core_neurons" or bench["output_tokens"] > 1:
            assert max(filter(None, ratios)) > 1
    table = (folder / "table.md").read_text()
    assert "predicted" in table
    assert "Measured on" not in table
    capsys.readouterr()
    assert main(words) == 0
    assert "0 to predict" in capsys.readouterr().out
    assert main([*words, "dry_run=true"]) == 0
    assert "0 to predict" in capsys.readouterr().out


def test_a_card_that_is_too_small_is_said_in_the_table(tmp_path: Path, capsys):
    words = ["+experiment=paper_hardware", "model=tiny", "hardware=titan_xp", "hardware.memory=1e6", "report=false"]
    words += ["methods=[dense]", "keep=[]", f"results_dir={tmp_path}"]
    assert main(words) == 0
    assert "tiny, dense, NVIDIA Titan Xp: does not fit (memory budget too small" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["hardware=[titan_xp,gtx]"], "unknown hardware 'gtx'"),
        (["hardware=[titan_xp,a100]", "hardware.memory=1e9"], "'hardware.memory' needs one card"),
        (["hardware=titan_xp", "hardware.dtype=bfloat16"], "hardware.dtype=bfloat16 has no peak on NVIDIA Titan Xp"),
        (["hardware=this"], "hardware=this has no public figures"),
        (["hardware=a100", "model=qwen2_5_vl_3b"], "model type 'qwen2_5_vl' cannot be predicted from shapes yet"),
    ],
)
def test_wrong_cards_take_one_line(words, told, tmp_path: Path, capsys):
    assert main(["+experiment=paper_hardware", "model=tiny", f"results_dir={tmp_path}", *words]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1


def test_published_speed_ups_stand_beside_predicted_ones_with_their_certainty(run):
    found = aggregate([run[1]])
    table = next(table for table in found.tables if table.name == "published_speed")
    titles = [column.title for column in table.columns]
    rows = [dict(zip(titles, (entry.text for entry in row.entries), strict=True)) for row in table.rows]
    published = load_published_speed()
    assert {row["Device"] for row in rows} == {"NVIDIA Titan Xp"}, "published for that card only"
    of_answers = [float(row["Published"]) for row in rows if row["Output tokens"] == "8"]
    assert of_answers == published["value"].round(2).tolist()
    assert {row["Certainty"] for row in rows} == {"stated", "secondary"}
    assert any(note.startswith("tiny, NVIDIA A100 80GB SXM: decode") for note in table.notes)
    figure = speedup_by_device(found.efficiency)
    assert [len(axes.lines) > 2 for axes in figure.axes] == [True] * 3


@pytest.mark.parametrize(("field", "value"), [("source", " "), ("certainty", "sure"), ("quantity", "x"), ("value", "")])
def test_published_speed_ups_without_a_source_or_certainty_are_refused(field, value, tmp_path: Path):
    row = load_published_speed().iloc[[0]].astype(str)
    row[field] = value
    row.to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(cm.UserError, match=r"bad\.csv line 2 is not valid"):
        load_published_speed(tmp_path)
