"""The long-decode road: what steps read, cover and say, the table, the figure and the settings."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from conftest import make_prompt

import corematching as cm
from corematching.cli import main
from corematching.errors import UserError
from corematching.evaluation.again import compute_again
from corematching.longdecode.figure import long_decode_figure
from corematching.longdecode.measure import dense_answer, forced, rows_of_steps
from corematching.longdecode.table import long_decode_table


@pytest.fixture(scope="module")
def spoken(random_llava):
    prompt = make_prompt(3, images=2)
    return prompt, dense_answer(random_llava, prompt, 6)


@torch.no_grad()
def test_dense_reads_covers_and_says_everything(random_llava, spoken):
    prompt, answer = spoken
    found = forced(random_llava, cm.build_method("dense"), prompt, answer)
    assert torch.equal(found.said, found.targets)
    rows = rows_of_steps(found.trace)
    assert rows["mass_read"] == 1
    assert rows["rows_read"] == rows["rows_held"] == found.trace.prompt_tokens + 3


@torch.no_grad()
def test_mass_is_the_share_of_dense_attention(random_llava, spoken):
    """In the first layer queries do not depend on what was read before: against stock attention, written out."""
    prompt, answer = spoken
    method = cm.build_method("streaming_llm", keep=24)
    found = forced(random_llava, method, prompt, answer)
    random_llava.set_attn_implementation("eager")
    try:
        ids = torch.cat([prompt["input_ids"], answer[None, :-1]], 1)
        whole = {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        attention = random_llava(**whole, output_attentions=True).attentions[0][0]
    finally:
        random_llava.set_attn_implementation("sdpa")
    length = prompt["input_ids"].shape[1]
    kept = [*range(4), *range(length - 20, length)]
    for step in range(5):
        row = attention[:, length + step]
        wanted = row[:, [*kept, *range(length, length + step + 1)]].sum(1).mean()
        assert found.trace.mass_read[0][step] == pytest.approx(float(wanted), abs=1e-4)
    rows = rows_of_steps(found.trace)
    assert 0 < rows["mass_read"] < 1
    assert rows["rows_read"] == pytest.approx(27)


def record(images, method, keep, share):
    metrics = {"context": 576.0 * images, "rows_read": 60.0, "rows_held": 600.0, "mass_read": share}
    return {
        "config": {
            "model": {"dtype": "float32"},
            "method": {"name": method},
            "benchmark": {"name": f"long_decode_{images}", "limit": 2},
        },
        "labels": {"model": "m", "method": method, "keep": keep},
        "score": {"value": 75.0},
        "metrics": {**metrics, "decode_ms_per_token": 2.5, "decode_speedup": 1.25},
        "provenance": {"hardware": {"gpu": None, "cpu": "a CPU"}, "versions": {"torch": "0"}, "git_commit": "c"},
    }


def test_table_and_figure_have_a_line_per_context_method_and_budget():
    samples = pd.DataFrame({"unit": ["0", "0", "1", "1"], "score": [1.0, 1, 1, 0]})
    records = [record(n, *line) for n in (8, 1) for line in (("snapkv", 0.1, 0.5), ("dense", None, 1.0))]
    table = long_decode_table([(one, samples) for one in records], ["told"])
    assert [row[:3] for row in table.rows] == [
        ("1", "dense", "—"), ("1", "snapkv", "0.1"), ("8", "dense", "—"), ("8", "snapkv", "0.1"),
    ]  # fmt: skip
    last = dict(zip(table.header, table.rows[-1]))
    assert (last["context"], last["% of dense attention covered"]) == ("4608", "50.0")
    assert last["says what dense says % [95 %]"].startswith("75.0 [")
    figure = long_decode_figure(records)
    assert [len(axes.get_lines()) for axes in figure.axes] == [2] * 4
    assert long_decode_figure([]) is None


def test_a_run_stores_cells_and_says_what_it_refuses(tmp_path, capsys):
    words = ["+experiment=long_decode", "decode.images=1", "decode.prompts=1", "decode.tokens=3", "tracking=none"]
    words += [f"results_dir={tmp_path}", "keep=0.1"]
    assert main([*words, "methods=[dense,refreshkv]"]) == 0
    (folder,) = tmp_path.iterdir()
    table = pd.read_csv(folder / "long_decode.csv").set_index("method")
    assert table.loc["dense", "% of dense attention covered"] == 100
    assert table.loc["refreshkv", "rows read/step"] < 0.2 * table.loc["dense", "rows read/step"]
    assert (folder / "figures" / "long_decode.png").is_file()
    said = capsys.readouterr().out
    assert "report: " in said
    assert not {line for line in said.splitlines() if line.strip().startswith("no ")}
    with pytest.raises(UserError, match="measure again with"):
        compute_again(next((folder / "cells").iterdir()))
    assert main([*words, "methods=[fastv]", "keep=64", "name=other"]) == 2
    assert "fastv leaves the KV cache alone" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("setting", ["decode.images=0", "decode.tokens=1", "decode.prompts=x", "decode=null"])
def test_wrong_settings_get_one_line(setting, capsys, tmp_path):
    assert main(["+experiment=long_decode", setting, f"results_dir={tmp_path}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1


def test_a_dry_run_counts_cells(capsys, tmp_path):
    assert main(["+experiment=long_decode", "dry_run=true", f"results_dir={tmp_path}"]) == 0
    assert "40 cells on tiny" in capsys.readouterr().out
