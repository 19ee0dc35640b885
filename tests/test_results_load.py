"""Reading stores: what cannot be used is left out and named, and never stops the rest."""

import json
import os
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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
from corematching.results.seal import sealed
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
        write_cell(tmp_path / "e", cell_record(cell_config("core_neurons", keep, "gqa", 1, kind=repr(keep)), value=1.0))
    keeps = load_results([tmp_path / "e"]).cells["keep"].tolist()
    assert sorted(map(repr, keeps)) == sorted(["None", "64", "0.4", "1", "1.0"])
    assert sorted(keeps, key=keep_order)[:2] == [None, 64]


WRONG = "feedfeedfeedfeed"


def damage(experiment, name):
    """Make one more folder that is wrong in the named way."""
    record = cell_record(cell_config("random", 64, "gqa", 40), value=50.0, n=40)
    folder = experiment / "cells" / (WRONG if name == "wrong id" else record["id"])
    folder.mkdir()
    if name == "truncated json":
        text = json.dumps(sealed(record, None))[:300]
    elif name == "not sealed":
        text = json.dumps(record)
    elif name == "edited":
        text = json.dumps(sealed(record, None)).replace("50.0", "99.0", 1)
    elif name == "other config":
        text = json.dumps(sealed(record | {"config": cell_config("random", 32, "gqa", 40)}, None))
    else:
        changes = {
            "wrong id": {},
            "other schema": {"schema": 99},
            "field missing": {"labels": {"method": "random"}},
            "field of another type": {"score": {**record["score"], "value": "high"}},
            "unknown status": {"status": "running"},
            "failed without a reason": {"status": "failed"},
        }
        text = json.dumps(sealed(record | changes.get(name, {}), None))
    if name == "a list":
        text = "[]"
    elif name == "deep":
        text = "[" * 100_000
    if name == "binary":
        (folder / "cell.json").write_bytes(b"\xff\xfe\x00{")
    elif name == "directory":
        (folder / "cell.json").mkdir()
    elif name == "pipe":
        os.mkfifo(folder / "cell.json")
    elif name == "link to nowhere":
        (folder / "cell.json").symlink_to("nowhere")
    elif name != "nothing inside":
        (folder / "cell.json").write_text(text)
    return folder


DAMAGES = {
    "nothing inside": "no cell.json",
    "link to nowhere": "no cell.json",
    "truncated json": "cannot be read",
    "binary": "cannot be read",
    "directory": "cannot be read",
    "pipe": "no regular file",
    "a list": "not an object",
    "deep": "nested too deeply",
    "other schema": "schema 99",
    "wrong id": "is of cell",
    "not sealed": "checksum",
    "edited": "checksum",
    "other config": "its configuration is that of cell",
    "field missing": "labels.model: Field required",
    "field of another type": "score.value",
    "unknown status": "status",
    "failed without a reason": "failed without error",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_bad_folder_is_named_and_left_out(experiment, name):
    before = aggregate([experiment]).tables
    folder = damage(experiment, name)
    with pytest.warns(StoreWarning, match=folder.name) as caught:
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


@pytest.fixture
def fastv(experiment):
    """The record and the rows of the one cell of fastv."""
    (record,) = [record for record in Store(experiment).records() if record["labels"]["method"] == "fastv"]
    return record, pq.read_table(experiment / "cells" / record["id"] / "samples.parquet")


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "of another cell", "a folder", "unasked for"])
def test_a_cell_whose_rows_are_not_its_own_is_left_out(experiment, fastv, how):
    record, _ = fastv
    folder = experiment / "cells" / record["id"]
    path = folder / "samples.parquet"
    content = path.read_bytes()
    path.unlink()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[:500])
    elif how == "a folder":
        path.mkdir()
    elif how == "of another cell":
        other = next(one for one in (experiment / "cells").iterdir() if one != folder)
        path.write_bytes((other / "samples.parquet").read_bytes())
    elif how == "unasked for":
        path.write_bytes(content)
        (folder / "cell.json").write_text(json.dumps(sealed(record, None)))
    with pytest.warns(StoreWarning, match=f"{folder.name}: samples.parquet"):
        aggregation = aggregate([experiment])
    assert set(aggregation.cells["method"]) == {"dense"}


@pytest.mark.parametrize("how", ["no score column", "scores that are words"])
def test_rows_without_usable_scores_cost_the_statistics_only(experiment, fastv, how):
    record, rows = fastv
    rows = rows.drop_columns("score")
    if how == "scores that are words":
        rows = rows.append_column("score", pa.array(["right"] * len(rows)))
    write_cell(experiment, record, rows)
    with pytest.warns(StoreWarning, match=f"{record['id']}: samples.parquet has"):
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
    write_cell(folder, cell_record(cell_config("fastv", 64, "gqa", 4), value=50.0, n=4), pa.Table.from_pandas(table))
    results = load_results([tmp_path / "e"])
    row = compare(results, select(results.cells)[0]).set_index("method").loc["fastv"]
    assert np.isnan(row["p"])
    assert "other questions" in row["remark"]
