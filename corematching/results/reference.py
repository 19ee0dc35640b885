"""Numbers other people published, each with its source; they only ever stand beside measured ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from corematching.errors import UserError
from corematching.results.tables import Column, Row, Table, budget, hole, mark, number, word
from corematching.results.titles import title

#: The repository's ``results/reference``; an installed wheel has none, and then no comparison is made.
FOLDER = Path(__file__).parents[2] / "results" / "reference"
COLUMNS = ("model", "method", "keep", "benchmark", "metric", "value", "source")


def load_reference(folder: Path = FOLDER) -> pd.DataFrame:
    """All rows of ``*.csv`` in a folder, with columns :data:`COLUMNS` (``keep`` empty for dense).

    Raises
    ------
    UserError
        If a file lacks a column, or a row has no source or no number.
    """
    return read_sourced(folder, COLUMNS, "has no source or no number; every number needs its source")


def read_sourced(
    folder: Path,
    columns: Sequence[str],
    wrong: str,
    fits: Callable[[pd.DataFrame], pd.Series] = lambda frame: pd.Series(True, frame.index),
) -> pd.DataFrame:
    """All rows of ``*.csv`` in a folder; each has a number in column ``value`` and says its ``source``.

    Parameters
    ----------
    columns
        Those that every file has; others are left out. All are text but ``value``.
    wrong
        What is said of a line without number or source, or that does not fit.
    fits
        Which rows are valid for other reasons.

    Raises
    ------
    UserError
        If a file lacks a column, or a row is not valid.
    """
    frames = [pd.DataFrame(columns=list(columns))]
    for path in sorted(folder.glob("*.csv")):
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        absent = [name for name in columns if name not in frame]
        if absent:
            raise UserError(f"{path.name} lacks column {absent[0]!r}; expected {', '.join(columns)}")
        values = pd.to_numeric(frame["value"], errors="coerce")
        bad = frame.index[(frame["source"].str.strip() == "") | values.isna() | ~fits(frame)]
        if len(bad):
            raise UserError(f"{path.name} line {bad[0] + 2} {wrong}")
        frames.append(frame[list(columns)].assign(value=values))
    return pd.concat(frames, ignore_index=True)


def published_table(cells: pd.DataFrame, reference: pd.DataFrame) -> Table | None:
    """Measured scores beside published ones, real data only; ``None`` if no cell has a published counterpart."""
    measured = cells[(cells["data"] != "mini") & (cells["status"] == "done") & cells["value"].notna()]
    rows = []
    for cell in measured.itertuples():
        keep = "" if cell.keep is None else budget(cell.keep)
        same = (reference["model"] == cell.model) & (reference["method"] == cell.method_name)
        for row in reference[
            same & (reference["benchmark"] == cell.benchmark) & (reference["keep"] == keep)
        ].itertuples():
            comparable = row.metric == cell.metric
            gap = number(cell.value - row.value) if comparable else hole(f"ours is {cell.metric}, theirs {row.metric}")
            entries = (
                word(cell.model),
                word(cell.method),
                word(budget(cell.keep)),
                word(title(cell.benchmark)),
                number(cell.value),
                number(row.value),
                gap,
                word(row.source),
            )
            rows.append(Row(entries))
    if not rows:
        return None
    words = (("model", "Model"), ("method", "Method"))
    columns = (
        *(Column(key, heading, numeric=False) for key, heading in words),
        Column("keep", "Keep"),
        Column("benchmark", "Benchmark", numeric=False),
        Column("measured", "Measured"),
        Column("published", "Published"),
        Column("difference", "Difference"),
        Column("source", "Source of the published number", numeric=False),
    )
    caption = "Measured here beside published elsewhere; test splits, prompts and post-processing may differ."
    return mark(Table("published", "Beside published numbers", caption, columns, tuple(rows)))
