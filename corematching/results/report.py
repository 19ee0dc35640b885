"""``report.html``: one self-contained page per experiment, readable without a network and safe to open.

Everything that comes from models, data or error messages is escaped; a content security policy in the page forbids
loading anything from anywhere. Same stores, same bytes.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from corematching import files
from corematching.results import overlays
from corematching.results.accuracy import contexts
from corematching.results.aggregate import Aggregation
from corematching.results.answers import disagreements, shortened
from corematching.results.efficiency_figures import efficiency_figures
from corematching.results.figures import all_figures, png
from corematching.results.figures.about import packages
from corematching.results.render import to_html
from corematching.results.tables import MINI_BANNER, budget, without_constants
from corematching.results.tradeoff import tradeoff
from corematching.texts import neutral

TEMPLATES = Path(__file__).parent / "templates"


def write_report(aggregation: Aggregation, out: Path, overlay_folder: Path | None = None) -> Path:
    """Write the report.

    Parameters
    ----------
    aggregation
        What :func:`corematching.results.aggregate.aggregate` returned.
    out
        The file to write; links to cells are relative to its folder.
    overlay_folder
        Where :func:`corematching.inspection.overlays.record` wrote, if it did.

    Returns
    -------
    Path
        ``out``.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: neutral(value) if type(value) is str else value,
    )
    environment.filters["shortened"] = shortened
    page = environment.get_template("report.html.j2").render(_content(aggregation, out.parent, overlay_folder))
    return files.write(out, page)


def _content(aggregation: Aggregation, base: Path, overlay_folder: Path | None) -> dict[str, Any]:
    cells, everything = aggregation.cells, aggregation.results.cells
    groups = contexts(cells) if len(cells) else []
    pareto = tradeoff(groups[0][1], aggregation.efficiency) if groups else None
    shown = overlays.load(overlay_folder) if overlay_folder else None
    links = {cell.id: _address(cell.folder, base) for cell in everything.itertuples()}
    content: dict[str, Any] = {
        "title": "CoreMatching-Bench: " + ", ".join(sorted(set(everything["experiment"]))),
        "banner": MINI_BANNER if (everything["data"] == "mini").any() else "",
        "facts": _facts(everything),
        "tables": [to_html(without_constants(table), links) for table in aggregation.tables],
        "pareto": json_in_html(pareto) if pareto else "",
        "pareto_axes": pareto["axes"] if pareto else [],
        "overlays": json_in_html(_with_images(shown, overlay_folder)) if shown and overlay_folder else "",
        "figures": _figures(groups, aggregation.efficiency),
        "answers": _answers(aggregation, groups, overlay_folder),
        "cells": [_cell(cell, links[cell.id]) for cell in everything.itertuples()],
        "problems": [str(problem) for problem in aggregation.results.problems],
        "provenance": _provenance(everything),
        "plotly": plotly_script() if pareto else "",
        "css": (TEMPLATES / "report.css").read_text(encoding="utf-8"),
        "script": (TEMPLATES / "report.js").read_text(encoding="utf-8"),
    }
    names = {
        "tables": "Tables",
        "pareto": "Trade-off",
        "overlays": "Overlays",
        "figures": "Figures",
        "answers": "Answers",
        "cells": "Cells",
    }
    anchors = {"pareto": "tradeoff"}
    content["sections"] = [(anchors.get(key, key), name) for key, name in names.items() if len(content[key])]
    return content


def json_in_html(value: Any) -> str:
    """JSON that is safe inside a ``<script>`` element: no angle brackets, ampersands or line separators."""
    text = json.dumps(value, allow_nan=False, sort_keys=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def plotly_script() -> str:
    """Plotly's own bundle, to be inlined."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _facts(cells: pd.DataFrame) -> list[tuple[str, str]]:
    counts = cells["status"].value_counts()
    names = {"done": "cells done", "failed": "failed", "not_scored": "not scored"}
    facts = [(f"{counts[status]:,}", name) for status, name in names.items() if status in counts]
    questions = cells.loc[cells["status"] == "done", "n"].sum()
    return [
        *facts,
        (f"{questions:,.0f}", "questions answered"),
        (f"{cells['seconds'].sum() / 60:,.1f}", "minutes in all"),
    ]


def _with_images(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    names = sorted({example["image"] for example in found["examples"]})
    return {**found, "images": {name: data_address((folder / name).read_bytes()) for name in names}}


def data_address(content: bytes, kind: str = "png") -> str:
    """A picture as a ``data:`` address."""
    return f"data:image/{kind};base64," + base64.b64encode(content).decode("ascii")


def _figures(groups: Sequence[tuple[str, pd.DataFrame]], efficiency: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Name, address and caption of every figure but the trade-off, of which the page has an interactive one."""
    made = [
        (name + suffix, figure)
        for suffix, group in groups
        for name, figure in all_figures(group, efficiency).items()
        if not name.startswith("pareto")
    ]
    made += efficiency_figures(efficiency).items()
    return [(name.replace("_", " "), data_address(png(figure)), figure.about.details) for name, figure in made]


def _answers(
    aggregation: Aggregation, groups: Sequence[tuple[str, pd.DataFrame]], folder: Path | None
) -> list[dict[str, Any]]:
    """Blocks of questions with thumbnails, where they were recorded."""
    blocks = []
    for _, group in groups:
        for block in disagreements(aggregation, group):
            pictures = [_thumbnail(folder, block.benchmark, question.doc_id) for question in block.questions]
            rows = list(zip(block.questions, pictures, strict=True))
            blocks.append({"title": block.title, "labels": block.labels, "rows": rows, "pictures": any(pictures)})
    return blocks


def _thumbnail(folder: Path | None, benchmark: str, doc_id: int) -> str:
    path = overlays.thumbnail_path(folder, benchmark, doc_id) if folder else None
    return data_address(path.read_bytes(), "jpeg") if path and path.is_file() else ""


def _address(folder: str, base: Path) -> str:
    return Path(os.path.relpath(Path(folder) / "cell.json", base)).as_posix()


def _cell(cell: Any, link: str) -> dict[str, Any]:
    return {
        **{name: getattr(cell, name) for name in ("id", "status", "kind", "model", "method", "benchmark")},
        "link": link,
        "keep": budget(cell.keep),
        "n": f"{cell.n:g}" if math.isfinite(cell.n) else "",
        "seconds": f"{cell.seconds:.1f}" if math.isfinite(cell.seconds) else "",
        "remark": cell.error or cell.note,
    }


def _provenance(cells: pd.DataFrame) -> list[tuple[str, str]]:
    """Where the numbers come from; no date of writing, so that the page is a function of the store."""
    sources = {
        "Models": sorted({f"{row.model} ({row.dtype})" if row.dtype else row.model for row in cells.itertuples()}),
        "Data": sorted({f"{row.data} {row.version}".strip() for row in cells.itertuples()})[:12],
        "Hardware": sorted(set(cells["hardware"])),
        "Git commits": sorted(set(cells["git_commit"]) - {""}),
        "Packages": packages(cells),
        "Last cell finished": [max(cells["finished"], default="")],
    }
    return [(name, ", ".join(values)) for name, values in sources.items() if any(values)]
