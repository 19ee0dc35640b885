"""Write tables as CSV, Markdown, LaTeX (booktabs) and HTML. All four show the same texts, character for character."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from corematching import files
from corematching.results.latex import latex_document, to_latex
from corematching.results.tables import Column, Entry, Table
from corematching.texts import neutral

def to_csv(table: Table) -> str:
    """The texts; what marks say (in words), reasons of holes and the banner stand in a last column, ``notes``."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*(neutral(column.title) for column in table.columns), "notes"])
    for row in table.rows:
        reasons = [
            f"{column.title}: {remark}"
            for column, entry in zip(table.columns, row.entries, strict=True)
            for remark in (entry.meaning, entry.reason)
            if remark
        ]
        writer.writerow(
            [
                *(neutral(entry.text + entry.spread) for entry in row.entries),
                neutral("; ".join([*reasons, *filter(None, [table.banner])])),
            ]
        )
    return out.getvalue()


def to_markdown(table: Table) -> str:
    """A pipe table: best in bold, second underlined, holes with footnotes below."""
    holes = table.holes()

    def show(entry: Entry) -> str:
        text = _wrap(escape_markdown(entry.text), entry.mark, "**{}**", "<u>{}</u>") + escape_markdown(
            entry.spread, trim=False
        )
        return (
            text
            + (f" {entry.symbol}" if entry.doubt else "")
            + (f"<sup>{holes.index(entry.reason) + 1}</sup>" if entry.reason else "")
        )

    lines = [f"### {escape_markdown(table.title)}", ""]
    if table.banner:
        lines += [f"> **{escape_markdown(table.banner)}**", ""]
    lines.append("| " + " | ".join(escape_markdown(column.title) for column in table.columns) + " |")
    lines.append("|" + "|".join("---:" if column.numeric else "---" for column in table.columns) + "|")
    lines += ["| " + " | ".join(show(entry) for entry in row.entries) + " |" for row in table.rows]
    lines += ["", escape_markdown(table.caption)]
    lines += ["", *(f"{place}. {escape_markdown(reason)}" for place, reason in enumerate(holes, 1))] if holes else []
    lines += ["", *(f"- {escape_markdown(note)}" for note in table.notes)] if table.notes else []
    return "\n".join(lines) + "\n"


def to_html(table: Table, links: Mapping[str, str] | None = None) -> str:
    """A ``<section>`` with the table (the report makes it sortable); all text is escaped.

    ``links`` gives the address of a cell by its id; without it numbers are not linked.
    """
    holes, links = table.holes(), links or {}

    def show(entry: Entry, column: Column) -> str:
        text = _wrap(escape_html(entry.text), entry.mark, "<strong>{}</strong>", "<u>{}</u>")
        if entry.cell in links:
            text = f'<a href="{escape_html(links[entry.cell])}">{text}</a>'
        text += escape_html(entry.spread)
        doubt = f' <span class="doubt" title="{entry.meaning}">{entry.symbol}</span>' if entry.doubt else ""
        note = f"<sup>{holes.index(entry.reason) + 1}</sup>" if entry.reason else ""
        value = "" if entry.value is None else f' data-value="{entry.value!r}"'
        hint = f' title="{escape_html(entry.detail or entry.reason)}"' if entry.detail or entry.reason else ""
        kind = ' class="number"' if column.numeric else ""
        return f"<td{kind}{value}{hint}>{text}{doubt}{note}</td>"

    lines = [f'<section class="table" id="table-{escape_html(table.name)}">', f"<h3>{escape_html(table.title)}</h3>"]
    if table.banner:
        lines.append(f'<p class="banner">{escape_html(table.banner)}</p>')
    titles = [f'<th class="{"number" if c.numeric else "word"}">{escape_html(c.title)}</th>' for c in table.columns]
    lines += ["<table>", f"<thead><tr>{''.join(titles)}</tr></thead>", "<tbody>"]
    for row in table.rows:
        fields = "".join(show(entry, column) for entry, column in zip(row.entries, table.columns, strict=True))
        lines.append(f'<tr data-block="{escape_html(row.block or "")}">{fields}</tr>')
    lines += ["</tbody>", "</table>", f'<p class="caption">{escape_html(table.caption)}</p>']
    if holes:
        lines += ['<ol class="holes">', *(f"<li>{escape_html(reason)}</li>" for reason in holes), "</ol>"]
    if table.notes:
        lines += ['<ul class="notes">', *(f"<li>{escape_html(note)}</li>" for note in table.notes), "</ul>"]
    return "\n".join([*lines, "</section>"]) + "\n"


FORMATS: dict[str, Callable[[Table], str]] = {"csv": to_csv, "md": to_markdown, "tex": to_latex, "html": to_html}


def write(tables: Iterable[Table], folder: Path) -> list[Path]:
    """Write every table in every format, plus ``tables.tex``, a document that shows them all.

    Returns
    -------
    list of Path
        The files written.
    """
    tables = list(tables)
    written = [
        files.write(folder / f"{table.name}.{suffix}", render(table))
        for table in tables
        for suffix, render in FORMATS.items()
    ]
    return [*written, files.write(folder / "tables.tex", latex_document(tables))]


def escape_html(text: str) -> str:
    """Text that a browser shows as it is."""
    return html.escape(neutral(text))


def escape_markdown(text: str, trim: bool = True) -> str:
    """Text that Markdown shows as it is, in one line, inside a table field or not; ``trim`` drops outer spaces."""
    text = neutral(text)
    for char in "\\`*_[]|":
        text = text.replace(char, "\\" + char)
    text = html.escape(text, quote=False)
    return " ".join(text.split() if trim else text.split(" "))


def _wrap(text: str, mark: str, best: str, second: str) -> str:
    return {"best": best, "second": second}.get(mark, "{}").format(text)
