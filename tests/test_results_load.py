"""Reading stores: what cannot be used is left out and named, and never stops the rest."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
from synthetic_store import (
    cell_config,
    cell_record,
    samples_table,
    write_accuracy_cell,
    write_cell,
    write_store,
)

from corematching.errors import UserError
from corematching.results.aggregate import aggregate
from corematching.results.compare import compare
from corematching.results.load import StoreWarning, load_results
from corematching.results.order import keep_order
from corematching.results.selection import select
from corematching.results.store import Store


@pytest.fixture
def experiment(tmp_path):
    return write_store(tmp_path, methods=("dense", "fastv"), keeps=(64,), benchmarks=("gqa",), n=40)


def cell_of(results, method):
    return results.cells[results.cells["method"] == method].iloc[0]


def test_reads_what_the_store_writes(tmp_path):
    config = cell_config("fastv", 64, "gqa", 4)
    record = cell_record(config, value=75.0, n=4)
    store = Store(tmp_path / "sweep")
    store.write(record, samples_table(np.array([1.0, 1, 1, 0])).to_pandas())
    row = load_results([store.root]).cells.iloc[0]
    assert (row["method"], row["keep"], row["value"], row["n"], row["experiment"]) == ("fastv", 64, 75.0, 4, "sweep")
    assert row["flops_total"] == record["trace"]["flops"]["total"]
    assert row["parameters"] == {"layer": 2, "keep": 64}


def test_budgets_keep_their_kind(tmp_path):
    for keep in (None, 64, 0.4, 1, 1.0):
        write_cell(tmp_path / "e", cell_record(cell_config("core_neurons", keep, "gqa", 1, kind=repr(keep))))
    keeps = load_results([tmp_path / "e"]).cells["keep"].tolist()
    assert sorted(map(repr, keeps)) == sorted(["None", "64", "0.4", "1", "1.0"])
    assert sorted(keeps, key=keep_order)[:2] == [None, 64]


def damage(experiment, name):
    """Make one more folder that is wrong in the named way, and return it."""
    folder = experiment / "cells" / "feedfeedfeedfeed"
    folder.mkdir()
    record = cell_record(cell_config("random", 64, "gqa", 40), value=50.0, n=40)
    record["id"] = folder.name
    if name == "truncated json":
        (folder / "cell.json").write_text(json.dumps(record)[:300])
    elif name == "other schema":
        (folder / "cell.json").write_text(json.dumps({**record, "schema": 99}))
    elif name == "wrong id":
        (folder / "cell.json").write_text(json.dumps({**record, "id": "0" * 16}))
    elif name == "field missing":
        del record["labels"]["model"]
        (folder / "cell.json").write_text(json.dumps(record))
    elif name == "field of another type":
        (folder / "cell.json").write_text(json.dumps({**record, "score": {"value": "high"}}))
    elif name == "unknown status":
        (folder / "cell.json").write_text(json.dumps({**record, "status": "running"}))
    elif name == "a list":
        (folder / "cell.json").write_text("[]")
    elif name == "binary":
        (folder / "cell.json").write_bytes(b"\xff\xfe\x00{")
    elif name == "directory":
        (folder / "cell.json").mkdir()
    return folder


DAMAGES = {
    "nothing inside": "no cell.json",
    "truncated json": "cannot be read",
    "other schema": "schema 99",
    "wrong id": "0000000000000000",
    "field missing": "lacks 'model'",
    "field of another type": "wrong type",
    "unknown status": "running",
    "a list": "not an object",
    "binary": "cannot be read",
    "directory": "cannot be read",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_bad_folder_is_named_and_left_out(experiment, name):
    before = aggregate([experiment]).tables
    damage(experiment, name)
    with pytest.warns(StoreWarning, match="feedfeedfeedfeed") as caught:
        after = aggregate([experiment])
    assert DAMAGES[name] in str(caught[0].message)
    assert [str(problem) for problem in after.results.problems] == [str(caught[0].message).removeprefix("left out ")]
    assert after.tables == before


def test_hidden_folders_and_files_are_no_cells(experiment):
    (experiment / "cells" / ".tmp-1").mkdir()
    (experiment / "cells" / "notes.txt").write_text("x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_results([experiment]).cells) == 2


@pytest.mark.parametrize("damage_samples", ["missing", "truncated", "no score column"])
def test_bad_sample_rows_cost_the_statistics_only(experiment, damage_samples):
    folder = next(
        path for path in (experiment / "cells").iterdir() if '"method": "fastv"' in (path / "cell.json").read_text()
    )
    path = folder / "samples.parquet"
    if damage_samples == "missing":
        path.unlink()
    elif damage_samples == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    else:
        pd.read_parquet(path).drop(columns="score").to_parquet(path)
    with pytest.warns(StoreWarning, match=folder.name):
        cells = aggregate([experiment]).cells
    row = cells[cells["method"] == "fastv"].iloc[0]
    assert np.isfinite(row["value"])
    assert np.isnan(row["low"])
    assert "cannot be read" in row["remark"]


@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_a_folder_without_cells_is_a_user_error(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no 'cells' folder"):
        load_results([tmp_path / folder])


def test_a_cell_in_two_experiments_counts_once(tmp_path):
    first = write_store(tmp_path, experiment="a", methods=("dense",), benchmarks=("gqa",), n=10)
    second = write_store(tmp_path, experiment="b", methods=("dense",), benchmarks=("gqa",), n=10)
    assert len(load_results([first, second]).cells) == 1


def test_the_newest_of_equal_rows_is_shown(tmp_path):
    for seed, day, value in ((0, "01", 40.0), (1, "03", 60.0), (2, "02", 50.0)):
        config = {**cell_config("random", 64, "gqa", 10), "seed": seed}
        record = cell_record(config, value=value, n=10)
        record["provenance"]["finished"] = f"2026-01-{day}T00:00:00+00:00"
        write_cell(tmp_path / "e", record)
    failed = cell_record({**cell_config("random", 64, "gqa", 10), "seed": 3}, status="failed")
    failed["provenance"]["finished"] = "2026-01-09T00:00:00+00:00"
    write_cell(tmp_path / "e", failed)
    cells, notes = select(load_results([tmp_path / "e"]).cells)
    assert cells["value"].tolist() == [60.0]
    assert notes == ["3 cells repeat others but for seed (0, 1, 2, 3); of each, the one finished last is shown."]


def test_each_number_of_questions_gets_a_table(tmp_path):
    for n in (10, 50):
        for method, keep in (("dense", None), ("fastv", 64)):
            write_accuracy_cell(tmp_path / "e", cell_config(method, keep, "gqa", n), np.linspace(0, 1, n))
    write_accuracy_cell(tmp_path / "e", cell_config("dense", None, "pope", 50), np.linspace(0, 1, 50))
    tables = {table.name: table for table in aggregate([tmp_path / "e"]).tables}
    assert set(tables) == {"accuracy_n10", "accuracy_n50"}
    assert "n = 10 questions" in tables["accuracy_n10"].caption
    assert [column.title for column in tables["accuracy_n50"].columns][2:4] == ["GQA", "POPE"]


def test_one_table_if_only_benchmarks_differ_in_their_number_of_questions(tmp_path):
    for benchmark, n in (("gqa", 10), ("pope", 50)):
        write_accuracy_cell(tmp_path / "e", cell_config("dense", None, benchmark, n), np.linspace(0, 1, n))
    assert [table.name for table in aggregate([tmp_path / "e"]).tables] == ["accuracy"]


def test_of_two_data_versions_one_is_shown_and_the_other_named(tmp_path):
    for version, n in (("old", 10), ("new", 50)):
        config = cell_config("dense", None, "gqa", 50)
        config["benchmark"]["version"] = version
        write_accuracy_cell(tmp_path / "e", config, np.linspace(0, 1, n))
    cells, notes = select(load_results([tmp_path / "e"]).cells)
    assert cells["n"].tolist() == [50]
    assert "version new, n = 50" in notes[0]


def test_one_label_with_two_parameter_sets_becomes_two_rows(tmp_path):
    for rho in (0.1, 0.2):
        config = cell_config("core_tokens", 64, "gqa", 10, rho=rho, beta=0.4)
        write_accuracy_cell(tmp_path / "e", config, np.linspace(0, 1, 10))
    cells, _ = select(load_results([tmp_path / "e"]).cells)
    assert sorted(cells["method"]) == ["core_tokens (rho=0.1)", "core_tokens (rho=0.2)"]


def test_cells_are_paired_by_question_not_by_position(tmp_path):
    folder = tmp_path / "e"
    scores = np.array([1.0, 1, 0, 0, 1, 0])
    write_cell(folder, cell_record(cell_config("dense", None, "gqa", 6), value=50.0, n=6), samples_table(scores))
    shuffled = samples_table(scores).take([3, 0, 5, 1, 4, 2])
    write_cell(folder, cell_record(cell_config("fastv", 64, "gqa", 6), value=50.0, n=6), shuffled)
    results = load_results([folder])
    row = compare(results, select(results.cells)[0]).set_index("method").loc["fastv"]
    assert (row["only_method"], row["only_dense"], row["difference"], row["p"]) == (0, 0, 0, 1)
    assert row["mark"] == ""  # six questions can tell nothing, so nothing is marked


def test_other_questions_are_not_paired(tmp_path):
    folder = tmp_path / "e"
    scores = np.array([1.0, 0, 1, 0])
    write_cell(folder, cell_record(cell_config("dense", None, "gqa", 4), value=50.0, n=4), samples_table(scores))
    table = samples_table(scores).to_pandas().assign(doc_id=[7, 8, 9, 10])
    folder = write_cell(folder, cell_record(cell_config("fastv", 64, "gqa", 4), value=50.0, n=4))
    table.to_parquet(folder / "samples.parquet")
    results = load_results([tmp_path / "e"])
    row = compare(results, select(results.cells)[0]).set_index("method").loc["fastv"]
    assert np.isnan(row["p"])
    assert "other questions" in row["remark"]
