"""Stored cells under damage: no change of what a table shows goes unnoticed, and no record stops a run."""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from synthetic_store import cell_config, cell_id, cell_record, write_cell, write_efficiency_cell, write_store

from corematching.efficiency.table import run_table
from corematching.evaluation.progress import outcome
from corematching.results.aggregate import aggregate
from corematching.results.reading import UnusableCell, read_cell
from corematching.results.seal import sealed
from corematching.results.store import Store
from corematching.results.table import build_table

FLIPS = 250


@pytest.fixture
def cell(tmp_path):
    """Folder of one finished cell with its rows."""
    store = write_store(tmp_path, methods=("fastv",), keeps=(64,), benchmarks=("gqa",), n=40)
    (folder,) = (store / "cells").iterdir()
    return folder


def unnoticed(folder, original) -> bool:
    """Whether the cell is read, and says something else than before."""
    return is_read(folder) and read_cell(folder) != original


@pytest.mark.parametrize("name", ["cell.json", "samples.parquet"])
def test_no_flipped_bit_changes_what_is_read(cell, name):
    path, original = cell / name, read_cell(cell)
    content, draw = path.read_bytes(), random.Random(0)
    accepted = 0
    for place in draw.sample(range(8 * len(content)), FLIPS):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        assert not unnoticed(cell, original), place
        accepted += is_read(cell)
    assert accepted == 0 if name == "samples.parquet" else accepted < FLIPS / 2  # white space may change in a record


def is_read(folder) -> bool:
    try:
        read_cell(folder)
    except UnusableCell:
        return False
    return True


@pytest.mark.parametrize("name", ["cell.json", "samples.parquet"])
def test_no_cut_or_padded_file_is_read(cell, name):
    path = cell / name
    content = path.read_bytes()
    for changed in (b"", content[:-7], content[: len(content) // 2], content[7:], content + b"0", content * 2):
        path.write_bytes(changed)
        assert not is_read(cell)
    path.write_bytes(content)
    assert is_read(cell)


def leaves(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of the values within a record, parts included; of a list's elements the first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, item in items:
        yield from leaves(item, (*path, key))


def changed(record: dict, path: tuple, value: Any) -> Any:
    """A copy of the record with another value at a path; ``...`` takes the value away."""
    if not path:
        return None if value is ... else value
    record = copy.deepcopy(record)
    *parents, last = path
    part: Any = record
    for key in parents:
        part = part[key]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    return record


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


BAD = [..., None, "word", "", -1, 2.5, 10**400, 1e308, True, [], {}, [None], {"a": {}}, nested(300), "\x1b[31m\udc80|"]


def test_no_edited_field_is_believed(cell):
    path, record = cell / "cell.json", read_cell(cell)
    for where in leaves(record):
        for value in (..., 9999, "edited", None):
            edited = changed(record, where, value)
            if edited == record:
                continue
            path.write_text(json.dumps(edited))
            assert not unnoticed(cell, record), (where, value)
            assert not is_read(cell), (where, value)


def test_a_cell_pasted_under_another_id_is_named(cell):
    other = cell.with_name(cell_id(cell_config("fastv", 32, "gqa", 40)))
    cell.rename(other)
    with pytest.raises(UnusableCell, match=f"is of cell '{cell.name}'"):
        read_cell(other)
    text = (other / "cell.json").read_text().replace(cell.name, other.name)
    record = json.loads(text)
    (other / "cell.json").write_text(json.dumps(sealed(record, record["checksums"]["samples"])))
    with pytest.raises(UnusableCell, match=f"its configuration is that of cell {cell.name}"):
        read_cell(other)


@pytest.mark.parametrize("text", [b"[" * 10**5, b"\xff\xfe{", b'{"schema": NaN}', b"9" * 10**4, b"null", b'"\\ud800"'])
def test_what_is_no_record_is_told_in_one_line(cell, text):
    (cell / "cell.json").write_bytes(text)
    with pytest.raises(UnusableCell, match=r"^[^\n]{1,200}$"):
        read_cell(cell)


def malformed(record: dict) -> Iterator[dict]:
    """Sealed records, each with one thing wrong; ids fit, so that only the schema can tell."""
    for number, where in enumerate(path for path in leaves(record) if path):
        for variant, value in enumerate(BAD):
            one = changed(record, where, value)
            if isinstance(one.get("config"), dict):
                one["config"]["variant"] = [number, variant]
                one["id"] = cell_id(one["config"])
                yield one


@pytest.mark.filterwarnings("ignore:left out", "ignore:skipping cell")
@pytest.mark.parametrize("kind", ["accuracy", "efficiency", "failed"])
def test_no_malformed_record_stops_anything(tmp_path, kind):
    """Whatever the schema lets through is shown by every table; the rest is left out."""
    if kind == "efficiency":
        folder = write_efficiency_cell(tmp_path / "made", "dense", None, engine="eager", dense_engine="eager")
        record = json.loads((folder / "cell.json").read_text())
    else:
        config = cell_config("fastv", 64, "gqa", 4)
        record = cell_record(config, value=50.0, n=4, status="failed" if kind == "failed" else "done")
    record.pop("checksums", None)
    written = [write_cell(tmp_path / "run", one) for one in malformed(record)]
    records = list(Store(tmp_path / "run").records())
    assert 0 < len(records) < len(written) / 2
    if kind == "efficiency":
        run_table(records).markdown()
    else:
        build_table([*records, None], ["gqa"], []).markdown()
        [outcome(one) for one in records]
    whole = write_store(tmp_path, methods=("dense", "random"), keeps=(64,), benchmarks=("gqa",), n=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        tables = aggregate([whole, tmp_path / "run"]).tables
    assert tables
