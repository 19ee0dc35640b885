"""Tables: right numbers, marks and holes; the same numbers in every format; deterministic files."""

import csv
import html
import io
import json
import re
import shutil
import subprocess
import warnings

import numpy as np
import pandas as pd
import pytest
from synthetic_store import (
    cell_config,
    cell_id,
    cell_record,
    samples_table,
    write_accuracy_cell,
    write_cell,
    write_efficiency_cell,
    write_store,
)

from corematching.commands import aggregate_command
from corematching.errors import UserError
from corematching.results import render
from corematching.results.aggregate import aggregate, write_tables
from corematching.results.latex import escape_latex
from corematching.results.reference import load_reference
from corematching.results.table import build_table
from corematching.results.tables import HOLE, MINI_BANNER, Column, Entry, Row, Table, budget, mark, number, significant

LATEX = shutil.which("tectonic") or shutil.which("pdflatex")


def write_scores(folder, method, keep, benchmark, scores, **options):
    config = cell_config(method, keep, benchmark, len(scores), **options)
    scores = np.asarray(scores, dtype=float)
    record = cell_record(config, value=100 * float(scores.mean()), n=len(scores))
    write_cell(folder, record, samples_table(scores))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = write_store(tmp_path_factory.mktemp("results"), n=60)
    write_cell(folder, cell_record(cell_config("fastv", 32, "gqa", 60), status="failed"))
    write_cell(folder, cell_record(cell_config("fastv", 32, "mmvet", 60), status="not_scored"))
    for method, keep, total in (("dense", None, 40.0), ("fastv", 64, 16.0)):
        write_efficiency_cell(
            folder, method, keep, prefill_ms=total / 2, end_to_end_ms=total, decode_ms_per_token=1.0, kv_bytes=2**20
        )
    return folder


@pytest.fixture(scope="module")
def aggregation(sweep):
    return aggregate([sweep])


def table_named(aggregation, name):
    return next(table for table in aggregation.tables if table.name == name)


def row_of(table, *starts):
    return next(row for row in table.rows if tuple(entry.text for entry in row.entries[: len(starts)]) == starts)


def entry_of(table, title, *starts):
    column = [column.title for column in table.columns].index(title)
    return row_of(table, *starts).entries[column]


def test_scores_and_share_of_dense(tmp_path):
    folder = tmp_path / "e"
    write_scores(folder, "dense", None, "gqa", [1, 1, 1, 1, 0])
    write_scores(folder, "dense", None, "pope", [1, 0, 1, 0, 0])
    write_scores(folder, "fastv", 64, "gqa", [1, 1, 0, 0, 0])
    write_scores(folder, "fastv", 64, "pope", [1, 0, 0, 0, 0])
    table = table_named(aggregate([folder]), "accuracy")
    assert entry_of(table, "GQA", "fastv", "64").text == "40.0"
    assert entry_of(table, "% of dense", "dense", "all").text == "100.0"
    assert entry_of(table, "% of dense", "fastv", "64").text == "50.0"  # mean of 40/80 and 20/40
    assert entry_of(table, "Tokens/layer", "fastv", "64").text == f"{(2 * 576 + 10 * 64) / 12:.1f}"


def test_benchmarks_stand_in_the_papers_order(aggregation):
    titles = [column.title for column in table_named(aggregation, "accuracy").columns]
    assert titles[2:7] == ["GQA", "TextVQA", "POPE", "MM-Vet", "% of dense"]
    assert titles[7:] == ["Tokens/layer", "KV MB", "GFLOPs", "Tokens/answer", "Hit the cap"]


def test_dense_comes_first_and_controls_lead_their_budget(aggregation):
    rows = [(row.entries[0].text, row.entries[1].text) for row in table_named(aggregation, "accuracy").rows]
    assert rows[:4] == [("dense", "all"), ("random", "192"), ("corematching", "192"), ("fastv", "192")]


def test_holes_say_why(aggregation):
    table = table_named(aggregation, "accuracy")
    failed, unscored = (entry_of(table, title, "fastv", "32") for title in ("GQA", "MM-Vet"))
    assert failed.text == unscored.text == HOLE
    assert failed.reason == "failed: RuntimeError: out of <memory> & time"
    assert unscored.reason == "not scored: no judge is configured"
    assert entry_of(table, "POPE", "fastv", "32").reason == "not run"
    assert entry_of(table, "% of dense", "fastv", "32").reason == "no score on GQA, TextVQA, POPE, which dense has"
    assert len(table.holes()) == len(set(table.holes()))


def test_mini_tables_say_that_they_are_not_comparable(aggregation, tmp_path):
    for table in aggregation.tables:
        if table.name != "hardware":
            assert table.banner == MINI_BANNER
            assert all(MINI_BANNER in html.unescape(show(table)) for show in render.FORMATS.values())
    real = write_store(tmp_path, methods=("dense", "fastv"), n=20, data="hub")
    assert all(table.banner == "" for table in aggregate([real]).tables)


def test_caption_states_model_data_n_and_conventions(aggregation):
    caption = table_named(aggregation, "accuracy").caption
    for part in ("Model tiny (float32)", "data mini", "prompt llava15", "n = 60", "2 per multiply-add", "Bold", HOLE):
        assert part in caption


def test_power_note_names_every_benchmark(aggregation):
    (note,) = [note for note in table_named(aggregation, "accuracy").notes if "80 % power" in note]
    assert "corrected over 6 rows" in note
    figure = r"\d+\.\d( \(\d+\.\d\))?"
    assert re.search(f"GQA {figure}, TextVQA {figure}, POPE {figure}", note)


def test_power_is_that_of_the_rule_used(tmp_path):
    dense = np.ones(60)
    write_scores(tmp_path / "e", "dense", None, "gqa", dense)
    for keep in range(1, 19):
        write_scores(tmp_path / "e", "fastv", keep, "gqa", dense)
    (note,) = [note for note in table_named(aggregate([tmp_path / "e"]), "accuracy").notes if "80 % power" in note]
    assert "over 18 rows" in note
    assert note.endswith("GQA 20.2.")


def test_marks_of_doubt(tmp_path):
    rng = np.random.default_rng(0)
    dense = (rng.random(100) < 0.8).astype(float)
    near, far = dense.copy(), dense.copy()
    near[:2] = 1 - near[:2]
    far[:60] = 0
    for method, keep, scores in (("dense", None, dense), ("fastv", 64, near), ("random", 64, far)):
        write_scores(tmp_path / "e", method, keep, "gqa", scores)
    table = table_named(aggregate([tmp_path / "e"]), "accuracy")
    assert entry_of(table, "GQA", "fastv", "64").doubt == "tie"
    assert entry_of(table, "GQA", "random", "64").doubt == ""
    assert entry_of(table, "GQA", "dense", "all").doubt == ""
    assert "McNemar" in entry_of(table, "GQA", "random", "64").detail
    assert "≈: not told apart from dense" in table.caption
    assert "≲" not in table.caption


@pytest.fixture
def doubtful(tmp_path):
    """Sixty questions and 18 rows: one loses nine answers, one gains nine, the others change nothing."""
    dense = np.repeat([1.0, 0.0], [40, 20])
    write_scores(tmp_path / "e", "dense", None, "gqa", dense)
    for keep in range(1, 19):
        scores = dense.copy()
        if keep == 18:
            scores[:9] = 0
        if keep == 17:
            scores[40:49] = 1
        write_scores(tmp_path / "e", "fastv", keep, "gqa", scores)
    return table_named(aggregate([tmp_path / "e"]), "accuracy")


def test_a_loss_that_only_the_correction_hides_is_no_tie(doubtful):
    entries = {keep: entry_of(doubtful, "GQA", "fastv", str(keep)) for keep in (16, 17, 18)}
    assert {keep: entry.doubt for keep, entry in entries.items()} == {16: "tie", 17: "higher", 18: "lower"}


def test_every_format_shows_marks_and_says_what_they_mean(doubtful):
    for suffix, symbols in {"md": "≈≲≳", "html": "≈≲≳", "tex": (r"$\approx$", r"$\lesssim$", r"$\gtrsim$")}.items():
        text = render.FORMATS[suffix](doubtful)
        for symbol in symbols:
            assert f"{symbol}: " in text  # the legend
            assert text.count(symbol) > 1
    assert "GQA: lower than dense, but not after correction" in render.to_csv(doubtful)


def test_with_too_few_questions_nothing_is_marked_and_that_is_said(tmp_path):
    write_scores(tmp_path / "e", "dense", None, "pope", [1, 1, 1, 1, 1, 1])
    for keep in (32, 64):
        write_scores(tmp_path / "e", "fastv", keep, "pope", [1, 1, 1, 1, 1, 0])
    table = table_named(aggregate([tmp_path / "e"]), "accuracy")
    assert entry_of(table, "POPE", "fastv", "32").doubt == ""
    assert any(note.startswith("Too few questions to tell any row from dense: POPE (n = 6)") for note in table.notes)
    assert not any("80 % power" in note for note in table.notes)
    assert not any(re.search(r"\b0\.0", note) for note in table.notes)


def test_where_everything_is_right_the_limit_is_one_sided(tmp_path):
    write_scores(tmp_path / "e", "dense", None, "gqa", np.ones(60))
    for keep in (32, 64):
        write_scores(tmp_path / "e", "fastv", keep, "gqa", np.ones(60))
    tables = aggregate([tmp_path / "e"]).tables
    entry = entry_of(table_named(aggregate([tmp_path / "e"]), "scaling"), "64", "GQA", "fastv")
    assert (entry.text, entry.spread) == ("100.0", " (≥ 94.0)")  # 0.025 ** (1 / 60)
    assert "95 % interval ≥ 94.0" in entry.detail
    assert any("GQA 100.0 means ≥ 94.0 (n = 60)" in note for note in tables[0].notes)


def test_a_metric_from_a_part_of_its_subtasks_is_marked_and_left_out_of_means(tmp_path):
    for method, keep, right in (("dense", None, 1.0), ("fastv", 64, 0.0)):
        write_scores(tmp_path / "e", method, keep, "gqa", [1, 1, 1, right])
        scores = np.array([1.0, 1, 1, 1 - right])
        record = cell_record(cell_config(method, keep, "mme", 4), value=100 * float(scores.mean()), n=4)
        write_cell(tmp_path / "e", record, samples_table(scores, parts=("existence", "count")))
    table = table_named(aggregate([tmp_path / "e"]), "accuracy")
    assert entry_of(table, "MME", "fastv", "64").spread == " †"
    assert entry_of(table, "% of dense", "fastv", "64").text == "75.0"
    assert "computed from 2 of 14 subtasks" in " ".join(table.notes)
    for show in (render.to_markdown, render.to_html):
        assert "†: from a part of its subtasks" in show(table)


def test_the_table_of_a_run_leaves_such_a_metric_out_too():
    records = []
    for method, keep, values in (("dense", None, (80.0, 400.0)), ("fastv", 64, (40.0, 533.0))):
        for benchmark, value in zip(("gqa", "mme"), values, strict=True):
            record = cell_record(cell_config(method, keep, benchmark, 60), value=value, n=60)
            record["score"]["metric"] = {"gqa": "accuracy", "mme": "perception"}[benchmark]
            record["metrics"] = {"existence": 200.0, "count": 200.0} if benchmark == "mme" else {}
            records.append(record)
    table = build_table(records, ["gqa", "mme"], [])
    assert {"533.0†", "50.0"} <= set(table.rows[1])
    assert any("† mme: computed from 2 of 10 subtasks" in note for note in table.notes)


@pytest.fixture
def seeds(tmp_path):
    """The random control with three seeds, and two methods: one as good as its mean, one better."""
    dense = np.ones(100)
    write_scores(tmp_path / "e", "dense", None, "gqa", dense)
    for seed, right in ((0, 50), (1, 54), (2, 58)):
        write_scores(tmp_path / "e", "random", 64, "gqa", np.arange(100) < right, seed=seed)
    write_scores(tmp_path / "e", "fastv", 64, "gqa", np.arange(100) < 54)
    write_scores(tmp_path / "e", "corematching", 64, "gqa", np.arange(100) < 80)
    return aggregate([tmp_path / "e"])


def test_cells_that_differ_only_in_the_methods_seed_are_one_row(seeds):
    table = table_named(seeds, "accuracy")
    entry = entry_of(table, "GQA", "random", "64")
    assert (entry.text, entry.spread) == ("54.0", " ± 4.0")
    assert [row.entries[0].text for row in table.rows].count("random") == 1
    assert any("random 3 seeds" in note for note in table.notes)
    row = seeds.cells.set_index("method").loc["random"]
    alone = seeds.cells.set_index("method").loc["fastv"]  # the same score, one cell
    assert row["low"] < alone["low"]
    assert row["high"] > alone["high"]
    for show in render.FORMATS.values():
        assert "4.0" in show(table)


def test_methods_are_compared_with_the_control_of_as_many_tokens(seeds):
    cells = seeds.cells.set_index("method")
    assert cells.loc["fastv", "control"] == "random"
    assert cells.loc["fastv", "control_difference"] == pytest.approx(0)
    assert cells.loc["corematching", "control_difference"] == pytest.approx(26)
    assert cells.loc["corematching", "control_low"] > 0
    (note,) = [note for note in table_named(seeds, "accuracy").notes if "random control" in note]
    assert note.endswith("): fastv 64.")


def test_seeds_under_labels_of_their_own_are_one_row(tmp_path):
    for seed in (0, 1):
        write_scores(tmp_path / "e", "random", 64, "gqa", [1, seed], seed=seed, label=f"random (seed {seed})")
    (cell,) = aggregate([tmp_path / "e"]).cells.to_dict("records")
    assert (cell["method"], cell["value"], cell["seeds"]) == ("random", 75.0, 2)


def simple(*texts, better="higher", block="b"):
    rows = tuple(Row((number(float(text)) if text != HOLE else Entry(HOLE, reason="x"),), block) for text in texts)
    return Table("t", "T", "c", (Column("a", "A", better),), rows)


def marks(table):
    return [row.entries[0].mark for row in mark(table).rows]


def test_marks():
    assert marks(simple("1", "3", "2")) == ["", "best", "second"]
    assert marks(simple("1", "3", "2", better="lower")) == ["best", "", "second"]
    # What reads the same is marked the same, and holes never are.
    assert marks(simple("3.01", "3.04", HOLE, "2")) == ["best", "best", "", "second"]
    assert marks(simple("3", "3")) == ["", ""]
    assert marks(simple("3", "2", block=None)) == ["", ""]
    assert marks(simple("3", "2", better="")) == ["", ""]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1234.5, "1234"), (12.345, "12.3"), (0.012345, "0.0123"), (-2.5, "-2.50")]
)
def test_significant_digits_without_exponents(value, text):
    assert significant(value).text == text


def test_numbers_that_are_none_become_holes():
    assert number(float("nan"), reason="why") == Entry(HOLE, reason="why")
    assert significant(None).text == HOLE
    assert number(-0.04).text == "-0.0"


@pytest.mark.parametrize(("keep", "text"), [(None, "all"), (64, "64"), (0.4, "40 %"), (1.0, "100 %"), (1, "1")])
def test_budgets_in_words(keep, text):
    assert budget(keep) == text


def texts_in(suffix, text):
    """The table body's fields as read back from a format, marks and footnotes stripped."""
    if suffix == "csv":
        return [row[:-1] for row in list(csv.reader(io.StringIO(text)))[1:]]
    if suffix == "md":
        lines = [line for line in text.splitlines() if line.startswith("|")][2:]
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
        cleaned = [[re.sub(r"<sup>\d+</sup>|\*\*|</?u>| [≈≲≳]", "", field) for field in row] for row in rows]
        return [[html.unescape(re.sub(r"\\(.)", r"\1", field)).strip() for field in row] for row in cleaned]
    if suffix == "html":
        body = text.partition("<tbody>")[2].partition("</tbody>")[0]
        rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in body.splitlines() if row]
        clean = [[re.sub(r"<sup>.*?</sup>|<span.*?</span>|<[^>]+>", "", field) for field in row] for row in rows]
        return [[html.unescape(field).strip() for field in row] for row in clean]
    body = text.partition(r"\midrule")[2].partition(r"\bottomrule")[0]
    rows = [line.removesuffix(r" \\").split(" & ") for line in body.splitlines() if line.endswith(r"\\")]
    clean = [[re.sub(r"\\rlap\{.*\}$", "", field) for field in row] for row in rows]
    clean = [[re.sub(r"\\(textbf|underline)\{([^}]*)\}", r"\2", field) for field in row] for row in clean]
    symbols = {"---": HOLE, "--": "–", r"$\geq$": "≥", r"\%": "%", r"\_": "_", r"$\pm$": "±"}
    for symbol, plain in symbols.items():
        clean = [[field.replace(symbol, plain) for field in row] for row in clean]
    return clean


def test_numbers_agree_in_all_formats(aggregation):
    for table in aggregation.tables:
        expected = [[entry.text + entry.spread for entry in row.entries] for row in table.rows]
        for suffix, show in render.FORMATS.items():
            assert texts_in(suffix, show(table)) == expected, (table.name, suffix)


def test_same_store_same_bytes(sweep, tmp_path):
    first = write_tables(aggregate([sweep]), tmp_path / "a")
    second = write_tables(aggregate([sweep]), tmp_path / "b")
    assert [path.name for path in first] == [path.name for path in second]
    assert all(one.read_bytes() == two.read_bytes() for one, two in zip(first, second, strict=True))


HOSTILE = r"a|b & c_d % $x$ #1 {z} ~ ^ \ <b> * ` [l](u) é 中"


def test_hostile_text_is_escaped_everywhere():
    table = Table("t", HOSTILE, HOSTILE, (Column("a", HOSTILE, numeric=False),), (Row((Entry(HOSTILE),)),), (HOSTILE,))
    latex = render.to_latex(table)
    assert r"a|b \& c\_d \% \$x\$ \#1 \{z\} \textasciitilde{} \textasciicircum{} \textbackslash{}" in latex
    assert "<b>" not in render.to_html(table)
    markdown = render.to_markdown(table)
    assert "<b>" not in markdown
    assert len({len(re.split(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("|")}) == 1
    assert next(csv.reader(io.StringIO(render.to_csv(table))))[0] == HOSTILE


def test_scaling_has_one_column_per_budget_with_intervals(aggregation):
    table = table_named(aggregation, "scaling")
    assert [column.title for column in table.columns] == ["Benchmark", "Method", "all (dense)", "192", "64", "32"]
    entry = entry_of(table, "192", "POPE", "fastv")
    assert re.fullmatch(r" \(\d+\.\d–\d+\.\d\)", entry.spread)
    assert entry.text == entry_of(table_named(aggregation, "accuracy"), "POPE", "fastv", "192").text


def test_no_scaling_table_for_one_budget(tmp_path):
    folder = write_store(tmp_path, keeps=(64,), n=20)
    assert "scaling" not in {table.name for table in aggregate([folder]).tables}


def test_ablation_shows_what_varies(tmp_path):
    draws = np.linspace(0, 1, 40)
    for method, keep, extra in (
        ("dense", None, {}),
        ("core_tokens", 64, {"rho": 0.2, "score": "core", "label": "tokens only"}),
        ("core_tokens", 64, {"rho": 0.1, "score": "core", "label": "rho 0.1"}),
        ("corematching", 64, {"rho": 0.2, "score": "core", "label": "both"}),
        ("fastv", 64, {}),
    ):
        write_accuracy_cell(tmp_path / "e", cell_config(method, keep, "gqa", 40, **extra), draws, skill=0.6)
    table = table_named(aggregate([tmp_path / "e"]), "ablation")
    titles = [column.title for column in table.columns]
    assert titles[1:3] == ["method", "rho"]
    assert "score" not in titles  # the same in every variant
    assert [row.entries[0].text for row in table.rows] == ["dense", "both", "rho 0.1", "tokens only"]
    assert entry_of(table, "rho", "rho 0.1").text == "0.1"


def test_a_sweep_over_keep_is_no_ablation(tmp_path):
    folder = write_store(tmp_path, methods=("dense", "core_tokens", "corematching"), n=20)
    assert "ablation" not in {table.name for table in aggregate([folder]).tables}


def test_hardware_speed_up_is_against_dense_of_the_same_setting(tmp_path, aggregation):
    table = table_named(aggregation, "hardware")
    titles = [column.title for column in table.columns]
    column = titles.index("Speed-up")
    assert [row.entries[column].text for row in table.rows] == ["1.00", "2.50"]
    assert titles[titles.index("Keep") + 1] == "Prefill ms"
    write_efficiency_cell(tmp_path / "e", "fastv", 64, end_to_end_ms=5.0)
    write_efficiency_cell(tmp_path / "e", "dense", None, end_to_end_ms=50.0, output_tokens=128)
    alone = table_named(aggregate([tmp_path / "e"]), "hardware")
    assert alone.rows[0].entries[column].reason == "no dense row with this device, regime and output length"


def test_pairwise_speed_up_is_preferred(tmp_path):
    write_efficiency_cell(tmp_path / "e", "dense", None, end_to_end_ms=50.0)
    write_efficiency_cell(tmp_path / "e", "fastv", 64, end_to_end_ms=25.0, paired_speedup=2.1)
    table = table_named(aggregate([tmp_path / "e"]), "hardware")
    column = [column.title for column in table.columns].index("Speed-up")
    assert [row.entries[column].text for row in table.rows] == ["1.00", "2.10"]


def test_of_rows_for_one_line_the_latest_counts(tmp_path):
    for seconds, end in (("20", 9.0), ("40", 8.0), ("30", 7.0)):
        folder = write_efficiency_cell(tmp_path / "e", "fastv", 64, end_to_end_ms=end, dense_engine="eager")
        record = json.loads((folder / "cell.json").read_text())
        record["provenance"]["finished"] = f"2026-01-01T00:00:{seconds}+00:00"
        record["config"]["benchmark"]["version"] = seconds
        record["id"] = cell_id(record["config"])
        write_cell(tmp_path / "f", record)
    write_efficiency_cell(tmp_path / "f", "fastv", 192, end_to_end_ms=1.0, dense_engine="eager")
    write_efficiency_cell(tmp_path / "f", "fastv", 64, end_to_end_ms=2.0, dense_engine="compiled", output_tokens=32)
    found = aggregate([tmp_path / "f"])
    assert sorted(found.efficiency["end_to_end_ms"]) == [1.0, 2.0, 8.0]
    assert table_named(found, "hardware").notes == ("2 older rows for the same lines are left out.",)


def test_predicted_rows_say_so(tmp_path):
    write_efficiency_cell(tmp_path / "e", "dense", None, end_to_end_ms=5.0, predicted=True)
    (row,) = table_named(aggregate([tmp_path / "e"]), "hardware").rows
    assert row.entries[2].text == "resident, float32 (predicted)"


def test_reference_numbers_all_have_a_source():
    reference = load_reference()
    assert len(reference) > 0
    assert (reference["source"].str.len() > 10).all()
    dense = reference[(reference["model"] == "llava_1_5_7b") & (reference["method"] == "dense")]
    assert dict(zip(dense["benchmark"], dense["value"], strict=True))["gqa"] == 62.0


def test_a_number_without_source_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("model,method,keep,benchmark,metric,value,source\nm,dense,,gqa,accuracy,60,\n")
    with pytest.raises(UserError, match=r"x\.csv line 2 has no source"):
        load_reference(tmp_path)


def test_published_numbers_stand_apart_and_only_beside_real_data(tmp_path):
    mini = write_store(tmp_path / "mini", models=("llava_1_5_7b",), methods=("dense",), n=20)
    real = write_store(tmp_path / "real", models=("llava_1_5_7b",), methods=("dense",), n=20, data="hub")
    assert "published" not in {table.name for table in aggregate([mini]).tables}
    tables = {table.name: table for table in aggregate([real]).tables}
    assert entry_of(tables["published"], "Published", "llava_1_5_7b", "dense", "all", "GQA").text == "62.0"
    assert "62.0" not in render.to_csv(tables["accuracy"])


def test_two_models_get_a_table_each(tmp_path):
    folder = write_store(tmp_path, models=("tiny", "other"), methods=("dense",), benchmarks=("gqa",), n=20)
    assert {table.name for table in aggregate([folder]).tables} == {"accuracy_tiny", "accuracy_other"}


def test_statistics_file_holds_every_comparison(aggregation, tmp_path):
    write_tables(aggregation, tmp_path)
    frame = pd.read_csv(tmp_path / "statistics.csv")
    assert len(frame) == len(aggregation.cells)
    assert {"low", "high", "p", "p_holm", "mark", "detectable", "estimator"} <= set(frame.columns)


def test_command_line(sweep, tmp_path, capsys):
    assert aggregate_command([str(sweep), "--out", str(tmp_path), "--no-figures"]) == 0
    assert (tmp_path / "tables" / "accuracy.tex").is_file()
    assert aggregate_command([str(tmp_path / "nowhere")]) == 2
    assert aggregate_command([str(sweep), str(sweep)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith("error: ")
    assert "nowhere" in errors[0]


def test_an_empty_store_gives_no_tables(tmp_path):
    (tmp_path / "e" / "cells").mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aggregation = aggregate([tmp_path / "e"])
        written = write_tables(aggregation, tmp_path / "out")
    assert aggregation.tables == []
    assert {path.name for path in written} == {"tables.tex", "statistics.csv"}


@pytest.mark.slow
@pytest.mark.skipif(LATEX is None, reason="neither tectonic nor pdflatex is installed, so LaTeX was not compiled")
def test_latex_compiles(aggregation, tmp_path):
    hostile = Table("hostile", HOSTILE, HOSTILE, (Column("a", HOSTILE),), (Row((Entry(HOSTILE, doubt="lower"),)),))
    render.write([*aggregation.tables, hostile], tmp_path)
    options = ["-interaction=nonstopmode", "-halt-on-error"] if LATEX.endswith("pdflatex") else []
    run = subprocess.run([LATEX, *options, "tables.tex"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:]
    assert (tmp_path / "tables.pdf").stat().st_size > 10_000


def wide_table(rows=60, numbers=30):
    columns = [Column(name, name.title(), numeric=False) for name in ("model", "device", "method")]
    columns += [Column(f"n{place}", f"Some number {place}", "lower") for place in range(numbers)]
    body = [
        Row(
            (
                Entry("a model (4 layers, random weights)"),
                Entry("a processor with a long name (2 cores)"),
                Entry(f"method {row}"),
                *(number(1000 * row + place, spread=" ± 12.3") for place in range(numbers)),
            ),
            f"block {row // 9}",
        )
        for row in range(rows)
    ]
    return Table("wide", "A wide table", "A sentence. " * 60, tuple(columns), tuple(body), ("A note.",) * 20)


def test_a_wide_latex_table_comes_in_parts_that_repeat_their_words():
    table = wide_table()
    latex = render.to_latex(table)
    parts = latex.split(r"\end{table}")[:-1]
    assert len(parts) > 2
    for part in parts:
        body = part.partition(r"\toprule")[2].partition(r"\bottomrule")[0]
        lines = [line.removesuffix(r" \\").split(" & ") for line in body.splitlines() if line.endswith(r"\\")][1:]
        assert len(lines) <= 40
        assert all(re.fullmatch(r"method \d+", line[0]) for line in lines)
        widest = max(sum(len(field.replace(r"$\pm$", "±")) for field in line) + 2 * len(line) for line in lines)
        assert widest < 140, "more than a page's width takes at a size that can be read"
    for row in table.rows:
        for entry in row.entries[3:]:
            assert entry.text in latex
    assert r"Device: a processor with a long name (2 cores)." in latex, "what is constant stands in the caption"


def test_latex_captions_have_four_lines_at_most(aggregation):
    for table in [*aggregation.tables, wide_table()]:
        for caption in re.findall(r"\\caption\{(.*)\}\n", render.to_latex(table)):
            assert len(caption) < 400
        told = render.to_latex(table)
        assert all(escape_latex(note) in told for note in table.notes[:1])
