"""Tables as LaTeX (booktabs) that stay legible on a page: wide ones lose what is constant, then come in parts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from corematching.results.tables import Entry, Row, Table, constant_columns
from corematching.texts import neutral

LATEX_ESCAPES = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "[": "{[}",  # behind \\ it would begin an argument
        "]": "{]}",
        "*": "{*}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "—": "---",
        "–": "--",
        "≈": r"$\approx$",
        "±": r"$\pm$",
        "×": r"$\times$",
        "≥": r"$\geq$",
        "≤": r"$\leq$",
        "·": r"$\cdot$",
        "→": r"$\rightarrow$",
        "≲": r"$\lesssim$",
        "≳": r"$\gtrsim$",
        "†": r"\dag{}",
        "✓": r"$\checkmark$",
        "ρ": r"$\rho$",
        "β": r"$\beta$",
        "µ": r"$\mu$",
        "−": "--",
        "\n": " ",
    }
)
_CHARACTER, _BETWEEN = 4.6, 12.0
"""Points that a character and the space between columns take in a small font of 9 points."""
_WIDTH = 600.0
"""Points beyond which a table is parted; on 500 points of text width it is shrunk to 7.5-point letters at most."""
_ROWS = 40
"""Rows that fit a page beside caption and notes."""
_CAPTION = 330
"""Characters of four lines; what else is to be said goes below the table."""


def to_latex(table: Table) -> str:
    """One or several ``table`` environments; needs booktabs, graphicx and amssymb.

    A table that is too wide gets titles in two lines; then columns whose rows all say the same move into the caption;
    then its numbers come in parts that repeat the words of their rows. Captions have four lines at most, the rest of
    caption and notes stands below the table.
    """
    places = list(range(len(table.columns)))
    stacked = _points(table, places, False) > _WIDTH
    constants = constant_columns(table) if _points(table, places, stacked) > _WIDTH else []
    places = [place for place in places if place not in constants]
    parts = [(columns, rows) for rows in _pages(table.rows) for columns in _parts(table, places, stacked)]
    facts = [f"{table.title}.", *(f"{table.columns[place].title}: {table.rows[0].entries[place].text}." for place in constants)]
    facts = facts if constants else []
    caption, below = _told(table, facts)
    label = f"tab:{table.name.replace('_', '-')}"
    return "\n".join(
        _part(table, columns, rows, stacked, caption, below, label, number, len(parts))
        for number, (columns, rows) in enumerate(parts, 1)
    )


def _part(
    table: Table,
    places: Sequence[int],
    rows: Sequence[Row],
    stacked: bool,
    caption: str,
    below: str,
    label: str,
    number: int,
    count: int,
) -> str:
    """One ``table`` environment; words below it stand under the last part."""
    holes = table.holes()
    columns = "".join("r" if table.columns[place].numeric else "l" for place in places)
    title = caption if number == 1 else f"{table.title}, continued."
    lines = [
        r"\begin{table}[tbp]",
        r"\centering",
        *([r"\addtocounter{table}{-1}"] if number > 1 else []),
        rf"\caption{{{escape_latex(title + (f' Part {number} of {count}.' if count > 1 else ''))}}}",
        rf"\label{{{label}{'' if number == 1 else f'-{number}'}}}",
        r"\small",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(_title(table, place, stacked) for place in places) + r" \\",
        r"\midrule",
    ]
    for place, row in enumerate(rows):
        if place and row.block != rows[place - 1].block:
            lines.append(r"\midrule")
        lines.append(" & ".join(_field(row.entries[column], holes) for column in places) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}}"]
    if below and number == count:
        lines += ["", r"\smallskip", rf"\parbox{{\linewidth}}{{\footnotesize\raggedright {escape_latex(below)}}}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _field(entry: Entry, holes: Sequence[str]) -> str:
    marked = {"best": r"\textbf{{{}}}", "second": r"\underline{{{}}}"}.get(entry.mark, "{}")
    doubt = rf"\rlap{{\,{escape_latex(entry.symbol)}}}" if entry.doubt else ""
    note = rf"\rlap{{\textsuperscript{{{holes.index(entry.reason) + 1}}}}}" if entry.reason else ""
    return marked.format(escape_latex(entry.text)) + escape_latex(entry.spread) + doubt + note


def _title(table: Table, place: int, stacked: bool) -> str:
    column = table.columns[place]
    lines = _two_lines(column.title) if stacked else [column.title]
    text = r"\\".join(escape_latex(line) for line in lines)
    return rf"\shortstack[{'r' if column.numeric else 'l'}]{{{text}}}" if len(lines) > 1 else text


def _two_lines(title: str) -> list[str]:
    """A title broken at the blank that leaves the shortest lines."""
    words = title.split(" ")
    ways = [[" ".join(words[:end]), " ".join(words[end:])] for end in range(1, len(words))]
    return min(ways, key=lambda lines: max(map(len, lines)), default=[title])


def _widths(table: Table, places: Sequence[int], stacked: bool) -> list[float]:
    """Points that each column takes, the space behind it included."""
    found = []
    for place in places:
        title = _two_lines(table.columns[place].title) if stacked else [table.columns[place].title]
        texts = [row.entries[place].text + row.entries[place].spread for row in table.rows]
        found.append(_CHARACTER * max(map(len, [*title, *texts])) + _BETWEEN)
    return found


def _points(table: Table, places: Sequence[int], stacked: bool) -> float:
    return sum(_widths(table, places, stacked))


def _parts(table: Table, places: list[int], stacked: bool) -> list[list[int]]:
    """Columns of each part: all, or as many numbers as fit beside the columns of words."""
    if _points(table, places, stacked) <= _WIDTH:
        return [places]
    words = [place for place in places if all(row.entries[place].value is None for row in table.rows)]
    words = [place for place in words if not any(row.entries[place].reason for row in table.rows)]
    parts: list[list[int]] = [[]]
    for place in places:
        if place in words:
            continue
        if parts[-1] and _points(table, [*words, *parts[-1], place], stacked) > _WIDTH:
            parts.append([])
        parts[-1].append(place)
    return [sorted([*words, *part]) for part in parts]


def _pages(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in groups that fit a page, parted between blocks where that leaves no group short."""
    pages: list[list[Row]] = [[]]
    for place, row in enumerate(rows):
        new_block = place > 0 and row.block != rows[place - 1].block
        if len(pages[-1]) >= _ROWS or (new_block and len(pages[-1]) >= 0.7 * _ROWS and len(rows) - place > 0.3 * _ROWS):
            pages.append([])
        pages[-1].append(row)
    return pages


def _told(table: Table, facts: Sequence[str]) -> tuple[str, str]:
    """Caption of four lines, and what stands below the table."""
    remarks = [*(f"({place}) {reason}." for place, reason in enumerate(table.holes(), 1)), *table.notes]
    sentences = [*filter(None, [table.banner]), *facts, *re.split(r"(?<=[.])\s+(?=[^a-z0-9(])", table.caption), *remarks]
    caption = ""
    while sentences and len(caption) + len(sentences[0]) < _CAPTION:
        caption = f"{caption} {sentences.pop(0)}".strip()
    return caption or f"{table.title}.", " ".join(sentences)


def latex_document(tables: Iterable[Table]) -> str:
    """A complete document that inputs the table files beside it."""
    inputs = [rf"\input{{{table.name}.tex}}" for table in tables]
    packages = [
        r"\usepackage[T1]{fontenc}",
        r"\usepackage{booktabs}",
        r"\usepackage{graphicx}",
        r"\usepackage{amssymb}",
    ]
    geometry = r"\usepackage[margin=2cm]{geometry}"
    return (
        "\n".join([r"\documentclass{article}", *packages, geometry, r"\begin{document}", *inputs, r"\end{document}"])
        + "\n"
    )


def escape_latex(text: str) -> str:
    """Text that LaTeX shows as it is; a character without a known command is shown as a question mark."""
    return "".join(char if ord(char) < 0x250 or char in "$\\" else "?" for char in neutral(text).translate(LATEX_ESCAPES))
