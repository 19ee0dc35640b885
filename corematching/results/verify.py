"""Check a whole store: every id, checksum and count, for people who copied, moved or archived one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from corematching.errors import UserError
from corematching.results.reading import SAMPLES, UnusableCell, one_line, read_cell


def verify(folder: Path) -> tuple[int, list[str]]:
    """Check the cells of an experiment.

    Parameters
    ----------
    folder
        ``<results_dir>/<experiment>``.

    Returns
    -------
    intact : int
        Cells with nothing wrong.
    problems : list of str
        One line per cell with something wrong: where, and what.

    Raises
    ------
    UserError
        If the folder is no experiment folder.
    """
    if not (folder / "cells").is_dir():
        raise UserError(f"{folder} is no experiment folder: it holds no 'cells' folder")
    intact, problems = 0, []
    for cell in sorted((folder / "cells").iterdir()):
        found = list(_problems(cell))
        intact += not found
        problems += [f"{cell}: {problem}" for problem in found]
    return intact, problems


def _problems(cell: Path) -> Iterator[str]:
    try:
        record = read_cell(cell)
    except UnusableCell as reason:
        yield str(reason)
        return
    yield from (f"{path.name} belongs to no cell" for path in sorted(cell.iterdir()) if path.name not in _files(record))
    if record["checksums"]["samples"] is None:
        if record["status"] != "failed" and record["kind"] == "accuracy":
            yield f"{SAMPLES} is missing: it was stored without"
        return
    try:
        rows = pq.ParquetFile(cell / SAMPLES).metadata.num_rows
    except (OSError, pa.ArrowException) as error:
        yield f"{SAMPLES} cannot be read ({one_line(error)})"
        return
    if rows != record["n"]:
        yield f"{SAMPLES} has {rows} rows, the record says n = {record['n']}"


def _files(record: dict[str, Any]) -> tuple[str, ...]:
    return ("cell.json", SAMPLES) if record["checksums"]["samples"] else ("cell.json",)
