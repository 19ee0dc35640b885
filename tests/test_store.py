"""The store: whole cells or none, claims that die with their owner, damage that is named and survived."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from synthetic_store import cell_config, cell_record

from corematching.errors import UserError
from corematching.evaluation.cells import Cell, canonical_json
from corematching.results import claims
from corematching.results import store as store_module
from corematching.results.store import Store, UnreadableCellWarning, plain
from corematching.results.table import build_table

CONFIG = cell_config("fastv", 64, "gqa", 2)
CELL = Cell.of(CONFIG, model="tiny", method="fastv", keep=64, benchmark="gqa", data="mini")
SAMPLES = pd.DataFrame({"doc_id": [0, 1], "score": [1.0, 0.0]})


def record(cell: Cell = CELL, **changes) -> dict:
    return {**cell_record(cell.config, value=50.0, n=2), "labels": cell.label, **changes}


def test_a_cell_is_what_its_configuration_says():
    same = Cell.of(dict(reversed(CONFIG.items())), method="another label")
    other = Cell.of(cell_config("fastv", 32, "gqa", 2), method="fastv", keep=64)
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
    store.write(record(n=2), SAMPLES)
    assert store.read(CELL.id)["n"] == 2
    assert store.samples(CELL.id).equals(SAMPLES)
    assert [found["id"] for found in store.records()] == [CELL.id]
    assert store.read("0" * 16) is None


def test_a_crash_while_writing_leaves_no_cell(tmp_path, monkeypatch):
    store = Store(tmp_path)

    def full_disk(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "sync", full_disk)
    with pytest.raises(UserError, match=r"No space left on device.*run the same command again"):
        store.write(record(), SAMPLES)
    assert list(store.cells.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "staging" / f"{CELL.id}-7-killed").mkdir()
    with store.claim(CELL.id):  # the next attempt clears what a crash left behind
        store.write(record())
    assert list((tmp_path / "staging").iterdir()) == []


@pytest.mark.parametrize("step", ["claims.os.open", "store.Path.mkdir"])
def test_a_disk_that_is_full_from_the_start_is_one_line(tmp_path, monkeypatch, step):
    store = Store(tmp_path)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    def attempt():
        with store.claim(CELL.id):
            store.write(record())

    monkeypatch.setattr(f"corematching.results.{step}", full_disk)
    with pytest.raises(UserError, match=r"No space left on device.*run the same command again"):
        attempt()


WRITES = ["Path.mkdir", "pd.DataFrame.to_parquet", "Path.write_text", "sync", "Path.rename"]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
def test_whatever_write_fails_the_old_cell_stays_and_one_line_says_so(tmp_path, monkeypatch, write, number):
    """A cell replaces another one; each step of it fails in turn, the first time and for good."""
    store = Store(tmp_path)
    store.write(record(status="not_scored"), SAMPLES)

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        module = "pandas" if write.startswith("pd.") else "corematching.results.store"
        patch.setattr(f"{module}.{write.removeprefix('pd.')}", refuse)
        with pytest.raises(UserError, match=r"^cannot store a cell .*run the same command again to resume$"):
            store.write(record(), SAMPLES)
    assert store.read(CELL.id)["status"] == "not_scored"
    assert list((tmp_path / "staging").iterdir()) == []
    store.write(record(), SAMPLES)
    assert store.read(CELL.id)["status"] == "done"


def test_a_cell_that_a_crash_took_out_of_its_place_comes_back(tmp_path):
    """Killed between the two renames of a replacement: the answers that were there are not lost."""
    store = Store(tmp_path)
    store.write(record(status="not_scored"), SAMPLES)
    (store.cells / CELL.id).rename(tmp_path / "staging" / f"{CELL.id}-7-killed-replaced")
    with store.claim(CELL.id) as mine:
        assert mine
        assert store.read(CELL.id)["status"] == "not_scored"


def test_a_failed_cell_is_replaced_by_its_next_attempt(tmp_path):
    store = Store(tmp_path)
    store.write(record(status="failed", error={"type": "E", "message": "", "traceback": ""}))
    store.write(record())
    assert store.read(CELL.id)["status"] == "done"
    assert len(list(store.cells.iterdir())) == 1


def occupy(path: Path, how: str) -> None:
    """Put something that is no cell in the place of one."""
    if how == "file":
        path.write_text("")
    elif how == "link":
        path.symlink_to(path.parent)
    elif how == "dangling link":
        path.symlink_to("nowhere")
    else:
        path.mkdir()
        if how == "broken":
            (path / "cell.json").write_text("{")
            (path / "more").mkdir()


@pytest.mark.parametrize("how", ["file", "link", "dangling link", "empty", "broken"])
def test_what_stands_in_a_cells_place_is_named_and_replaced(tmp_path, how):
    store = Store(tmp_path)
    folder = store.cells / CELL.id
    occupy(folder, how)
    with pytest.warns(UnreadableCellWarning, match=r"cell\.json") as warned:
        assert store.read(CELL.id) is None
    assert str(folder) in str(warned[0].message)
    store.write(record(), SAMPLES)
    assert store.read(CELL.id)["status"] == "done"
    assert list((tmp_path / "staging").iterdir()) == []


def test_records_need_what_readers_rely_on(tmp_path):
    for change, why in (
        ({"status": "perhaps"}, "status"),
        ({"config": {**CONFIG, "seed": 1}}, "is not the id of its configuration"),
        ({"n": float("nan")}, "n: "),
        ({"trace": None}, "done without trace"),
    ):
        with pytest.raises(ValueError, match=why):
            Store(tmp_path).write(record(**change))


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


def test_two_writers_of_one_cell_both_get_on(tmp_path, monkeypatch):
    """One stood still too long: in the middle of its writing, the other claims, writes and publishes the same cell."""
    first, second = Store(tmp_path), Store(tmp_path)
    monkeypatch.setattr(claims, "EXPIRY", 0.0)
    for late, value in ((record(), 50.0), (record(score={**record()["score"], "value": 60.0}), 60.0)):
        stage, done = first._stage, []

        def meanwhile(*given, stage=stage, done=done):
            if not done:
                done.append(True)
                with second.claim(CELL.id):
                    pass  # seen for the first time
                with second.claim(CELL.id) as mine:
                    assert mine
                    second.write(record(), SAMPLES)
            return stage(*given)

        monkeypatch.setattr(first, "_stage", meanwhile)
        with first.claim(CELL.id) as mine:
            assert mine
            first.write(late, SAMPLES)
        assert done
        assert first.read(CELL.id)["score"]["value"] == value
        assert list((tmp_path / "staging").iterdir()) == []
        monkeypatch.setattr(first, "_stage", stage)


def test_a_cell_published_between_our_two_renames_is_no_error(tmp_path, monkeypatch):
    store = Store(tmp_path)
    rename, others = Path.rename, []

    def just_before(self, target):
        if Path(target) == store.cells / CELL.id and not others:
            others.append(True)
            Store(tmp_path).write(record(), SAMPLES)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", just_before)
    store.write(record(n=3), SAMPLES)
    assert others
    assert store.read(CELL.id)["n"] == 3
    assert list((tmp_path / "staging").iterdir()) == []


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
    config = {"method": {"name": method}, "keep": keep, "benchmark": benchmark}
    cell = Cell.of(config, method=method, keep=keep, benchmark=benchmark)
    status = "done" if value is not None else "not_scored"
    score = {"metric": "accuracy", "value": value, "scale": 100, "note": "" if value is not None else "no judge"}
    trace = {"visual_tokens_per_layer": keep or 576, "kv_bytes": 2e6, "flops": {"prefill": 2e12, "total": 3e12}}
    made = {"kind": "accuracy", "id": cell.id, "config": cell.config, "labels": cell.label}
    return {**made, "status": status, "score": score, "trace": trace}


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
