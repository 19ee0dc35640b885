"""The store: whole cells or none, claims that die with their owner, damage that is named and survived."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from corematching.errors import UserError
from corematching.evaluation.cells import Cell, canonical_json
from corematching.results import store as store_module
from corematching.results.store import Store, UnreadableCellWarning, plain
from corematching.results.table import build_table

CELL = Cell.of({"model": {"name": "m"}, "method": {"name": "fastv", "keep": 64}}, method="fastv", keep=64)


def record(cell: Cell = CELL, **changes) -> dict:
    return {
        "schema": 1,
        "kind": "accuracy",
        "id": cell.id,
        "status": "done",
        "config": cell.config,
        "labels": cell.label,
        **changes,
    }


def test_a_cell_is_what_its_configuration_says():
    same = Cell.of({"method": {"keep": 64, "name": "fastv"}, "model": {"name": "m"}}, method="another label")
    other = Cell.of({"model": {"name": "m"}, "method": {"name": "fastv", "keep": 32}}, method="fastv", keep=64)
    assert same == CELL
    assert hash(same) == hash(CELL)
    assert same.id == CELL.id
    assert other != CELL
    assert other.id != CELL.id
    assert len(CELL.id) == 16
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"x": float("nan")})


def test_written_cells_are_read_back(tmp_path):
    store = Store(tmp_path / "run")
    samples = pd.DataFrame({"doc_id": [0, 1], "score": [1.0, 0.0]})
    store.write(record(n=2), samples)
    assert store.read(CELL.id)["n"] == 2
    assert store.samples(CELL.id).equals(samples)
    assert [found["id"] for found in store.records()] == [CELL.id]
    assert store.read("0" * 16) is None


def test_a_crash_while_writing_leaves_no_cell(tmp_path, monkeypatch):
    store = Store(tmp_path)

    def full_disk(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "_sync", full_disk)
    with pytest.raises(UserError, match=r"No space left on device.*run the same command again"):
        store.write(record(), pd.DataFrame({"doc_id": [0]}))
    assert list(store.cells.iterdir()) == []
    monkeypatch.undo()
    with store.claim(CELL.id):  # the next attempt clears what the crash left behind
        store.write(record())
    assert list((tmp_path / "staging").iterdir()) == []


def test_a_failed_cell_is_replaced_by_its_next_attempt(tmp_path):
    store = Store(tmp_path)
    store.write(record(status="failed", error={"type": "E"}))
    store.write(record())
    assert store.read(CELL.id)["status"] == "done"
    assert len(list(store.cells.iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "unreadable"),
        ("[]", "object"),
        (json.dumps(record() | {"schema": 9}), "schema 9"),
        (json.dumps(record() | {"id": "f" * 16}), "folder's name"),
        (json.dumps(record() | {"status": "fine"}), "'fine'"),
        (None, "missing"),
    ],
)
def test_damaged_cells_are_named_and_skipped(tmp_path, text, why):
    store = Store(tmp_path)
    folder = store.cells / CELL.id
    folder.mkdir()
    if text is not None:
        (folder / "cell.json").write_text(text)
    with pytest.warns(UnreadableCellWarning, match=why) as warned:
        assert store.read(CELL.id) is None
    assert str(folder) in str(warned[0].message)


def test_records_need_what_readers_rely_on(tmp_path):
    with pytest.raises(ValueError, match="status"):
        Store(tmp_path).write(record(status="perhaps"))


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="results_dir=PATH") as error:
        Store(tmp_path / "file" / "run")
    assert "\n" not in str(error.value)


def test_plain_leaves_only_json():
    import numpy as np

    value = {"a": np.float64(1.5), 2: (np.int64(3), float("nan")), "b": np.bool_(True), "p": Path("x")}
    assert plain(value) == {"a": 1.5, "2": [3, None], "b": True, "p": "x"}


def test_a_claim_excludes_others_until_it_ends(tmp_path):
    first, second = Store(tmp_path), Store(tmp_path)
    with first.claim(CELL.id) as mine:
        assert mine
        with second.claim(CELL.id) as also_mine:
            assert not also_mine
        with second.claim("another") as free:
            assert free
    with second.claim(CELL.id) as mine_now:
        assert mine_now
    assert list((tmp_path / "claims").iterdir()) == []


def test_a_killed_process_frees_its_claim(tmp_path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\n"
            "from corematching.results.store import Store\n"
            f"with Store(sys.argv[1]).claim({CELL.id!r}) as mine:\n"
            "    print(mine, flush=True)\n"
            "    time.sleep(60)\n",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert holder.stdout.readline().strip() == "True"
        store = Store(tmp_path)
        with store.claim(CELL.id) as mine:
            assert not mine
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
        deadline = time.monotonic() + 5
        freed = False
        while not freed and time.monotonic() < deadline:
            with store.claim(CELL.id) as freed:
                pass
        assert freed
    finally:
        holder.kill()
        holder.wait()


def scored(method: str, keep: int | None, benchmark: str, value: float | None) -> dict:
    cell = Cell.of(
        {"method": {"name": method}, "keep": keep, "benchmark": benchmark},
        method=method,
        keep=keep,
        benchmark=benchmark,
    )
    status = "done" if value is not None else "not_scored"
    score = {"metric": "accuracy", "value": value, "scale": 100, "note": "" if value is not None else "no judge"}
    trace = {"visual_tokens_per_layer": keep or 576, "kv_bytes": 2e6, "flops": {"prefill": 2e12, "total": 3e12}}
    return record(cell, status=status, score=score, trace=trace)


def test_the_table_averages_what_dense_has_and_names_the_holes(tmp_path):
    records = [
        scored("dense", None, "gqa", 60.0),
        scored("dense", None, "mmvet", None),
        scored("fastv", 64, "gqa", 45.0),
        scored("fastv", 64, "mmvet", None),
        scored("random", 64, "mmvet", None),
        None,
    ]
    table = build_table(records, ["gqa", "mmvet"], ["a note"])
    assert table.rows == (
        ("dense", "—", "60.0", "—", "100.0", "576.0", "2.00", "3000", "—", "—"),
        ("fastv", "64", "45.0", "—", "75.0", "64.0", "2.00", "3000", "—", "—"),
        ("random", "64", "—", "—", "—", "64.0", "2.00", "3000", "—", "—"),
    )
    assert table.notes[:2] == ("a note", "% of dense averages gqa")
    assert "— mmvet, fastv keep=64: not scored (no judge)" in table.notes
    assert table.notes[-1] == "— 1 cells have not run yet"
    table.write(tmp_path)
    read = pd.read_csv(tmp_path / "table.csv")
    assert list(read["gqa"].fillna(-1)) == [60.0, 45.0, -1]
    markdown = (tmp_path / "table.md").read_text().splitlines()
    assert markdown[2] == "| dense | — | 60.0 | — | 100.0 | 576.0 | 2.00 | 3000 | — | — |"
