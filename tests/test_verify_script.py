"""scripts/verify.py: every id, checksum and count of a store, one line for each thing that is wrong."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from synthetic_store import write_store

from corematching.results.reading import read_cell
from corematching.results.seal import sealed


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parent.parent / "scripts" / "verify.py"
    spec = importlib.util.spec_from_file_location("verify_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path, methods=("dense", "fastv"), keeps=(64, 32), benchmarks=("gqa",), n=10)


def test_an_intact_store_is_said_to_be(script, store, capsys):
    assert script.main([str(store)]) == 0
    assert capsys.readouterr().out == f"{store}: 3 cells intact, 0 problems\n"


def test_what_is_wrong_is_named_and_the_rest_is_counted(script, store, capsys):
    edited, miscounted, _ = sorted((store / "cells").iterdir())
    path = edited / "cell.json"
    path.write_text(path.read_text().replace('"n": 10', '"n": 11'))
    record = read_cell(miscounted)
    (miscounted / "notes.txt").write_text("")
    record["n"] = 11
    (miscounted / "cell.json").write_text(json.dumps(sealed(record, record["checksums"]["samples"])))
    (store / "cells" / "stray").write_text("")
    assert script.main([str(store)]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == f"{store}: 1 cells intact, 4 problems"
    assert [line.split(": ")[0] for line in lines] == [
        str(edited),
        *[str(miscounted)] * 2,
        str(store / "cells" / "stray"),
    ]
    assert "checksum" in lines[0]
    assert lines[1].endswith("notes.txt belongs to no cell")
    assert lines[2].endswith("has 10 rows, the record says n = 11")


def test_no_experiment_is_one_line(script, tmp_path, capsys):
    assert script.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
