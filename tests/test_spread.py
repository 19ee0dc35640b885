"""Work on large stores is spread over processes: the same tables, byte for byte, and the same complaints."""

import pytest
from synthetic_store import write_store

from corematching.results import spread
from corematching.results.aggregate import aggregate, write_tables


@pytest.mark.filterwarnings("ignore:left out")
def test_several_processes_make_the_tables_of_one(tmp_path, monkeypatch):
    store = write_store(
        tmp_path, methods=("dense", "random", "fastv"), keeps=(64, 32), benchmarks=("gqa", "pope"), n=30
    )
    first, second = sorted((store / "cells").iterdir())[:2]
    (first / "cell.json").write_text("{")
    (second / "samples.parquet").unlink()
    found = {}
    for large in (10**9, 0):
        monkeypatch.setattr(spread, "LARGE", large)
        aggregation = aggregate([store])
        written = write_tables(aggregation, tmp_path / str(large))
        found[large] = [path.read_bytes() for path in written], aggregation.results.problems
    assert found[0] == found[10**9]
    assert len(found[0][1]) == 2
