"""The command lines behind ``scripts/aggregate.py``, ``scripts/report.py`` and ``scripts/compare.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from corematching.errors import UserError
from corematching.results import remote
from corematching.results.overlays import FOLDER
from corematching.results.publish import publish


def aggregate_command(arguments: Sequence[str] | None = None) -> int:
    """Write tables and figures; returns the exit status (2: wrong input)."""
    parser = argparse.ArgumentParser(prog="aggregate.py", description="Tables and figures of finished experiments.")
    parser.add_argument("experiments", nargs="+", help="experiment folders, results/<experiment>, or their URLs")
    parser.add_argument("--out", type=Path, help="where to write (default: the experiment's own folder)")
    parser.add_argument("--no-figures", action="store_true", help="tables only")
    chosen = parser.parse_args(arguments)
    return _run(lambda: _aggregate(chosen))


def report_command(arguments: Sequence[str] | None = None) -> int:
    """Write the report; returns the exit status (2: wrong input)."""
    parser = argparse.ArgumentParser(prog="report.py", description="One self-contained page about experiments.")
    parser.add_argument("experiments", nargs="+", help="experiment folders, results/<experiment>, or their URLs")
    parser.add_argument("--out", type=Path, help="file to write (default: report.html in the experiment's folder)")
    parser.add_argument("--overlays", type=int, default=0, metavar="N", help="record overlays for N images first")
    chosen = parser.parse_args(arguments)
    return _run(lambda: _report(chosen))


def compare_command(arguments: Sequence[str] | None = None) -> int:
    """Print two folders' differences; returns the exit status (2: wrong input)."""
    parser = argparse.ArgumentParser(prog="compare.py", description="Two experiments' differences, cell by cell.")
    parser.add_argument("first", help="experiment folder, results/<experiment>, or its URL")
    parser.add_argument("second", help="another one; differences are second less first")
    parser.add_argument("--out", type=Path, help="also write comparison.csv, .md, .tex and .html into this folder")
    chosen = parser.parse_args(arguments)
    return _run(lambda: _compare(chosen))


def _run(action: Callable[[], None]) -> int:
    try:
        action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _aggregate(chosen: Any) -> None:
    if len(chosen.experiments) > 1 and chosen.out is None:
        raise UserError("several experiments need --out FOLDER: none of them owns the common tables")
    folders = [remote.local(place) for place in chosen.experiments]
    for path in publish(folders, chosen.out, figures=not chosen.no_figures, report=False):
        print(path)
    if chosen.out is None:
        remote.upload(folders[0])


def _report(chosen: Any) -> None:
    from corematching.results.aggregate import aggregate
    from corematching.results.report import write_report

    folders = [remote.local(place) for place in chosen.experiments]
    first = folders[0]
    if len(chosen.experiments) > 1 and chosen.out is None:
        raise UserError("several experiments need --out FILE: none of them owns the common report")
    aggregation = aggregate(folders)
    if chosen.overlays:
        from corematching.inspection.overlays import record_experiment

        record_experiment(aggregation.cells, first / FOLDER, chosen.overlays)
    print(write_report(aggregation, chosen.out or first / "report.html", first / FOLDER))
    if chosen.out is None:
        remote.upload(first)


def _compare(chosen: Any) -> None:
    from corematching.results import render
    from corematching.results.folders import compare_folders

    table = compare_folders(chosen.first, chosen.second)
    print(render.to_markdown(table), end="")
    if chosen.out:
        render.write([table], chosen.out)
