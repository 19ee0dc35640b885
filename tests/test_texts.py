"""Nothing from outside steers: control and bidi characters are shown, marks of a format print as they are."""

import html
import io

import pytest
from rich.console import Console

from corematching.errors import UserError
from corematching.evaluation.cells import Cell
from corematching.evaluation.progress import Reporter
from corematching.results import render, terminal
from corematching.results.table import KEEP, METHOD, RunTable
from corematching.results.tables import Column, Entry, Row, Table
from corematching.texts import neutral

UGLY = "[red]x[/red] a|b \\c *d* \x1b[31m \u202egpj\u2066 \x00\x9b e\nf \ud83d <i>"
STEERING = "\x1b\u202e\u2066\x00\x9b\ud83d\x07\r"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢 \u200d", "plain é 漢 \u200d"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\u202e", "\\u202e"),
        ("a\n\tb", "a  b"),
        ("\ud83d", "\\ud83d"),
    ],
)
def test_neutral(text, shown):
    assert neutral(text) == shown


def test_an_error_is_one_line():
    assert str(UserError(UGLY)).isprintable()


@pytest.mark.parametrize("form", render.FORMATS)
def test_no_format_of_a_table_is_steered(form):
    table = Table("t", UGLY, UGLY, (Column("m", UGLY, numeric=False),), (Row((Entry(UGLY),)),), (UGLY,), UGLY)
    text = render.FORMATS[form](table)
    assert not set(STEERING) & set(text)
    if form == "tex":
        assert "\n{[}red{]}x" in text, "a bracket behind a line's end begins no argument"
    if form == "html":
        assert "<i>" not in text
        assert "[red]x[/red]" in html.unescape(text)


def test_a_runs_table_shows_labels_as_they_are():
    table = RunTable((METHOD, KEEP), ((UGLY, "64"),), (UGLY,), (UGLY,))
    out = io.StringIO()
    terminal.show(table, Console(file=out, force_terminal=True, width=200, color_system=None))
    for text in (out.getvalue(), table.markdown(), table.csv()):
        assert not set(STEERING) & set(text)
    assert "[red]x[/red] a|b \\c *d* \\x1b[31m" in out.getvalue()
    assert r"\[red\]x\[/red\] a\|b \\c \*d\*" in table.markdown()


def test_progress_shows_labels_as_they_are():
    out = io.StringIO()
    with Reporter(1, Console(file=out, force_terminal=True, width=200, color_system=None)) as reporter:
        reporter.start(Cell.of({}, method="[bold]a[/bold]\x07", keep=None, benchmark="gqa"))
        reporter._live.refresh()
        reporter.say("[bold]b[/bold]\x07")
    assert "[bold]a[/bold]\\x07" in out.getvalue()
    assert "[bold]b[/bold]\\x07" in out.getvalue()
    assert "\x07" not in out.getvalue()
