"""A run's table on a terminal of any width, or in a log: titles get shorter, columns move, numbers are never cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import combining, east_asian_width

from corematching.results.table import RunColumn, RunTable

_GAP = 2
_READABLE_LABEL, _LEAST_LABEL = 20, 8


@dataclass(frozen=True)
class Layout:
    """How a table fits into a width.

    Attributes
    ----------
    titles
        Of all columns: long or short ones.
    widths
        Of all columns; label texts that are longer are folded.
    blocks
        Places of the columns that stand side by side, block below block; each begins with the label columns.
    dropped
        Titles of columns that are left out.
    """

    titles: tuple[str, ...]
    widths: tuple[int, ...]
    blocks: tuple[tuple[int, ...], ...]
    dropped: tuple[str, ...] = ()


def lay_out(columns: Sequence[RunColumn], rows: Sequence[Sequence[str]], width: int | None) -> Layout:
    """Fit columns into `width` characters (None: as many as it takes).

    First titles get short and long labels are folded, then cost columns are left out, from the last one on; what still
    does not fit goes into blocks below each other. Numbers are never folded.
    """
    everything = tuple(range(len(columns)))
    full = tuple(column.title for column in columns)
    widths = _natural(full, rows)
    if width is None or _total(widths, everything) <= width:
        return Layout(full, widths, (everything,))
    titles = tuple(column.short or column.title for column in columns)
    widths = _natural(titles, rows)
    kept = list(everything)
    every_label = [place for place in everything if columns[place].role == "label"]
    spare = width - _total(widths, [place for place in everything if place not in every_label]) - _GAP
    widths = _shrunk(widths, every_label, spare, least=_READABLE_LABEL)
    costs = [place for place in everything if columns[place].role == "cost"]
    while _total(widths, kept) > width and costs:
        kept.remove(costs.pop())
    dropped = tuple(full[place] for place in everything if place not in kept)
    labels = [place for place in kept if columns[place].role == "label"]
    numbers = [place for place in kept if place not in labels]
    if _total(widths, kept) > width:
        widths = _shrunk(widths, labels, width - max((widths[place] for place in numbers), default=0) - _GAP)
    blocks: list[list[int]] = [[]]
    for place in numbers:
        if blocks[-1] and _total(widths, [*labels, *blocks[-1], place]) > width:
            blocks.append([])
        blocks[-1].append(place)
    return Layout(titles, widths, tuple((*labels, *block) for block in blocks), dropped)


def lines_of(table: RunTable, layout: Layout) -> list[str]:
    """The table as lines of text; an empty line parts blocks."""
    lines: list[str] = []
    for number, block in enumerate(layout.blocks):
        lines += [""] if number else []
        lines += _line(table, layout, block, layout.titles)
        lines.append("─" * _total(layout.widths, block))
        for row in table.rows:
            lines += _line(table, layout, block, row)
    return lines


def show(table: RunTable, console: Any) -> None:
    """Print a table, its warnings and its notes to a rich console; a file or a pipe has no edge."""
    layout = lay_out(table.columns, table.rows, console.width if console.is_terminal else None)
    for line in lines_of(table, layout):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if layout.dropped:
        _note(console, f"left out at this width: {', '.join(layout.dropped)} (see table.md)", "dim")
    for warning in table.warnings:
        _note(console, f"WARNING: {warning}", "bold yellow")
    for note in table.notes:
        _note(console, note, "dim")


def _note(console: Any, text: str, style: str) -> None:
    console.print(f"  {text}", style=style, markup=False, highlight=False, soft_wrap=True)


def cell_len(text: str) -> int:
    """Columns that a text takes on a terminal: East Asian wide characters take two, combining ones none."""
    return sum(0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in text)


def _natural(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[int, ...]:
    return tuple(max(cell_len(text) for text in column) for column in zip(titles, *rows, strict=True))


def _total(widths: Sequence[int], places: Sequence[int]) -> int:
    return sum(widths[place] for place in places) + _GAP * (len(places) - 1)


def _shrunk(
    widths: Sequence[int], labels: Sequence[int], room: int, least: int = _LEAST_LABEL
) -> tuple[int, ...]:
    """Widths with the widest label columns made narrower, down to `least`, until the labels have room."""
    narrow = list(widths)
    while _total(narrow, labels) > room:
        widest = max(labels, key=lambda place: narrow[place], default=None)
        if widest is None or narrow[widest] <= least:
            break
        narrow[widest] -= 1
    return tuple(narrow)


def _line(table: RunTable, layout: Layout, block: Sequence[int], texts: Sequence[str]) -> list[str]:
    """One row as lines of text: several where a label is folded."""
    labels = {place for place in block if table.columns[place].role == "label"}
    folded = {place: _folded(texts[place], layout.widths[place]) if place in labels else [texts[place]] for place in block}
    lines = []
    for number in range(max(map(len, folded.values()))):
        fields = []
        for place in block:
            text = folded[place][number] if number < len(folded[place]) else ""
            blank = " " * (layout.widths[place] - cell_len(text))
            fields.append(text + blank if place in labels and table.columns[place].left else blank + text)
        lines.append((" " * _GAP).join(fields).rstrip())
    return lines


def _folded(text: str, width: int) -> list[str]:
    """The text in lines of at most `width`, broken at blanks where there are some."""
    lines, line = [], ""
    for word in text.split(" "):
        longer = f"{line} {word}" if line else word
        if cell_len(longer) <= width:
            line = longer
            continue
        lines += [line] if line else []
        while cell_len(word) > width:
            end = next(end for end in range(len(word), 0, -1) if cell_len(word[:end]) <= width or end == 1)
            lines.append(word[:end])
            word = word[end:]
        line = word
    return [*lines, line] if line or not lines else lines


