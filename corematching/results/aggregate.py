"""From stores to the paper's tables: read, compare, lay out, write."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from corematching import files
from corematching.results import render
from corematching.results.accuracy import ablation_table, accuracy_table, contexts, scaling_table
from corematching.results.compare import COLUMNS, WORDS, compare
from corematching.results.hardware import efficiency_rows, hardware_table
from corematching.results.load import Results, load_results
from corematching.results.published_speed import load_published_speed, published_speed_table
from corematching.results.reference import load_reference, published_table
from corematching.results.selection import CONTEXT, select
from corematching.results.tables import Table, budget


@dataclass
class Aggregation:
    """Everything that tables, figures and the report are made from.

    Attributes
    ----------
    results
        The stores as read, with the problems met.
    cells
        Accuracy cells shown, with intervals and tests (see :func:`corematching.results.compare.compare`).
    efficiency
        Efficiency rows (see :func:`corematching.results.hardware.efficiency_rows`).
    tables
        Accuracy, hardware, ablation, scaling and published-number tables (scores and speed-ups), as far as the stores hold their cells.
    """

    results: Results
    cells: pd.DataFrame
    efficiency: pd.DataFrame
    tables: list[Table]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without garbage collections, which go through all records of a large store again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@_no_collection()
def aggregate(folders: Iterable[Path | str]) -> Aggregation:
    """Read experiments and make their tables.

    Parameters
    ----------
    folders
        Experiment folders; several are put into one set of tables.

    Raises
    ------
    UserError
        If a folder is no experiment folder, or none of them holds a readable cell.
    """
    results = load_results(folders)
    selected, notes = select(results.cells)
    cells = compare(results, selected)
    efficiency = efficiency_rows(results.cells)
    tables: list[Table | None] = []
    groups = contexts(cells) if len(cells) else []
    tables += [accuracy_table(group, suffix, notes) for suffix, group in groups]
    tables.append(hardware_table(efficiency))
    tables.append(published_speed_table(efficiency, load_published_speed()) if len(efficiency) else None)
    for build in (ablation_table, scaling_table):
        tables += [build(group, suffix) for suffix, group in groups]
    tables.append(published_table(cells, load_reference()) if len(cells) else None)
    return Aggregation(results, cells, efficiency, [table for table in tables if table is not None])


@_no_collection()
def write_tables(aggregation: Aggregation, folder: Path) -> list[Path]:
    """Write all tables in all formats, and ``statistics.csv`` with every comparison behind them."""
    written = render.write(aggregation.tables, folder)
    text = statistics_frame(aggregation.cells).to_csv(index=False, float_format="%.6g", lineterminator="\n")
    return [*written, files.write(folder / "statistics.csv", text)]


def statistics_frame(cells: pd.DataFrame) -> pd.DataFrame:
    """One row per accuracy cell: labels, score, interval, difference from dense, tests, and the cell's id."""
    labels = [*CONTEXT, "benchmark", "method", "keep", "status", "n", "metric", "value", *COLUMNS]
    frame = cells[[*labels, *WORDS, "experiment", "id"]]
    return frame.assign(keep=[budget(keep) for keep in frame["keep"]])
