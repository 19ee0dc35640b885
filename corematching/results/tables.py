"""Tables as data: every number is formatted once, here, and every renderer shows that text.

A :class:`Table` holds entries (text, marks, reasons for holes); :mod:`corematching.results.render` writes it as CSV,
Markdown, LaTeX and HTML. What goes into the paper's tables is decided in :mod:`corematching.results.aggregate`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from corematching.results.columns import Quantity
from typing import Any

HOLE = "—"
#: Marks beside a number that is compared with dense's: what is printed, and what it says.
MARKS = {
    "tie": ("≈", "not told apart from dense"),
    "lower": ("≲", "lower than dense, but not after correction"),
    "higher": ("≳", "higher than dense, but not after correction"),
}
#: Mark of a number that was computed from a part of its subtasks.
PARTIAL = "†"
MINI_BANNER = "Bundled tiny model on the bundled mini suite: not comparable with published numbers."

BUNDLED_TIMES = "Bundled tiny model: times show that the machinery works, and nothing about real models."


@dataclass(frozen=True)
class Entry:
    """One field of a table.

    Attributes
    ----------
    text
        What every format shows.
    value
        The number behind the text, for marks and sorting; ``None`` for words and holes.
    spread
        Shown after the text, e.g. `` ± 2.1``.
    mark
        ``"best"``, ``"second"`` or empty.
    doubt
        How sure the difference from dense is: a key of :data:`MARKS`, or empty.
    detail
        More about the number (its interval, its p-value): a tooltip in HTML.
    reason
        Why there is no number, for holes.
    cell
        Id of the cell that the number comes from.
    """

    text: str
    value: float | None = None
    spread: str = ""
    mark: str = ""
    doubt: str = ""
    detail: str = ""
    reason: str = ""
    cell: str = ""

    @property
    def symbol(self) -> str:
        """What is printed after the number for :attr:`doubt`."""
        return MARKS[self.doubt][0] if self.doubt else ""

    @property
    def meaning(self) -> str:
        """The same in words."""
        return MARKS[self.doubt][1] if self.doubt else ""


@dataclass(frozen=True)
class Column:
    """A column: its key, its title and, if its numbers compete, which direction is ``better`` ("higher" or "lower")."""

    key: str
    title: str
    better: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Row:
    """Entries in column order; numbers compete within rows of one ``block`` (rows of block ``None`` do not compete)."""

    entries: tuple[Entry, ...]
    block: str | None = None


@dataclass(frozen=True)
class Table:
    """A table with everything a reader needs beside it.

    Attributes
    ----------
    name
        File name and LaTeX label.
    title
        A few words.
    caption
        Model, data, n and conventions, in sentences.
    columns, rows
        Rows are in the order shown; a rule separates blocks.
    notes
        One line each: power, superseded cells.
    banner
        A line that must stand out, such as :data:`MINI_BANNER`.
    """

    name: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())
    banner: str = ""

    def holes(self) -> list[str]:
        """The reasons of the holes, each once, in the order met; a footnote number is a place here, from 1."""
        return list(dict.fromkeys(entry.reason for row in self.rows for entry in row.entries if entry.reason))


#: Keys of columns that say what a row is.
NAMING = ("method", "label", "benchmark")


def constant_columns(table: Table) -> list[int]:
    """Places of columns of words that say the same in every row, but for those that name the rows."""
    return [
        place
        for place, column in enumerate(table.columns)
        if column.key not in NAMING
        and len(table.rows) > 1
        and len({row.entries[place].text for row in table.rows}) == 1
        and all(row.entries[place].value is None and not row.entries[place].reason for row in table.rows)
    ]


def without_constants(table: Table) -> Table:
    """The table without its constant columns; what they say stands in the caption instead."""
    constant = constant_columns(table)
    if not constant:
        return table

    def kept(fields: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(field for place, field in enumerate(fields) if place not in constant)

    said = ", ".join(f"{table.columns[place].title} {table.rows[0].entries[place].text}" for place in constant)
    rows = tuple(replace(row, entries=kept(row.entries)) for row in table.rows)
    return replace(table, columns=kept(table.columns), rows=rows, caption=f"{table.caption} In every row: {said}.")


def word(text: object) -> Entry:
    """An entry that is no number."""
    return Entry(str(text))


def hole(reason: str, cell: str = "") -> Entry:
    """An entry without a number, and why."""
    return Entry(HOLE, reason=" ".join(reason.split()) or "not measured", cell=cell)


def number(value: float | None, digits: int = 1, reason: str = "not measured", **more) -> Entry:
    """A number with a fixed count of decimals; a hole if there is none."""
    if value is None or not math.isfinite(value):
        return hole(reason, more.get("cell", ""))
    text = f"{value:.{digits}f}"
    return Entry("0" if digits == 0 and text == "-0" else text, float(value), **more)


def significant(value: float | None, digits: int = 3, reason: str = "not measured", **more) -> Entry:
    """A number with a fixed count of significant digits and no exponent; a hole if there is none."""
    if value is None or not math.isfinite(value):
        return hole(reason, more.get("cell", ""))
    if value == 0:
        return Entry("0", 0.0, **more)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return Entry(f"{value:.{decimals}f}", float(value), **more)


def quantity(what: Quantity, value: float | None, reason: str = "not measured", **more) -> Entry:
    """A number as its column shows it everywhere; a hole if there is none."""
    text = what.text(value)
    if text is None or value is None:
        return hole(reason, more.get("cell", ""))
    return Entry(text, float(what.factor * value), **more)


def budget(keep: object) -> str:
    """A budget in words: a count of visual tokens, a kept fraction, or "all"."""
    if keep is None or keep != keep:
        return "all"
    if isinstance(keep, float) and 0 < keep <= 1:
        return f"{100 * keep:g} %"
    return f"{keep:g}" if isinstance(keep, (int, float)) else str(keep)


def unit_scale(values: Sequence[float], units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest ``(factor, name)`` of ``units`` (descending) that leaves the largest value at 1 or more."""
    finite = [abs(value) for value in values if value is not None and math.isfinite(value)]
    largest = max(finite, default=0.0)
    return next(((factor, name) for factor, name in units if largest >= factor), units[-1])


#: One unit for FLOPs per question, in every table and figure.
FLOPS_UNITS = ((1e9, "GFLOPs"),)


def mark(table: Table) -> Table:
    """Mark the best and second-best number of each competing column, per block; equal texts share a mark."""
    rows = [list(row.entries) for row in table.rows]
    for index, column in enumerate(table.columns):
        if not column.better:
            continue
        for block in {row.block for row in table.rows if row.block is not None}:
            _mark_column(
                [entries for entries, row in zip(rows, table.rows, strict=True) if row.block == block], index, column
            )
    marked = tuple(replace(row, entries=tuple(entries)) for row, entries in zip(table.rows, rows, strict=True))
    return replace(table, rows=marked)


def _mark_column(rows: list[list[Entry]], index: int, column: Column) -> None:
    # By the printed text, not the value behind it: two rows that read the same must be marked the same.
    texts = {float(entries[index].text) for entries in rows if entries[index].value is not None}
    if len(rows) < 2 or len(texts) < 2:
        return
    ranked = sorted(texts, reverse=column.better == "higher")
    for entries in rows:
        entry = entries[index]
        if entry.value is not None:
            place = ranked.index(float(entry.text))
            entries[index] = replace(entry, mark=("best", "second")[place] if place < 2 else "")
