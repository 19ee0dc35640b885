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
from corematching.results.accuracy import contexts, methods_of
from corematching.results.aggregate import Aggregation
from corematching.results.efficiency_figures import efficiency_figures
from corematching.results.figures import all_figures, pareto_points, png, styles
from corematching.results.render import escape_html, to_html
from corematching.results.tables import FLOPS_UNITS, MINI_BANNER, budget, unit_scale
from corematching.results.titles import benchmark_order, title
from corematching.texts import neutral

TEMPLATES = Path(__file__).parent / "templates"
QUESTIONS_SHOWN = 20


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
    page = environment.get_template("report.html.j2").render(_content(aggregation, out.parent, overlay_folder))
    return files.write(out, page)


def _content(aggregation: Aggregation, base: Path, overlay_folder: Path | None) -> dict[str, Any]:
    cells, everything = aggregation.cells, aggregation.results.cells
    groups = contexts(cells) if len(cells) else []
    pareto = _pareto(groups[0][1], aggregation.efficiency) if groups else None
    shown = overlays.load(overlay_folder) if overlay_folder else None
    links = {cell.id: _address(cell.folder, base) for cell in everything.itertuples()}
    content = {
        "title": "CoreMatching-Bench: " + ", ".join(sorted(set(everything["experiment"]))),
        "banner": MINI_BANNER if (everything["data"] == "mini").any() else "",
        "facts": _facts(everything),
        "tables": [to_html(table, links) for table in aggregation.tables],
        "pareto": json_in_html(pareto) if pareto else "",
        "pareto_axes": pareto["axes"] if pareto else [],
        "overlays": json_in_html(_with_images(shown, overlay_folder)) if shown and overlay_folder else "",
        "figures": [item for suffix, group in groups for item in _figures(suffix, group, aggregation.efficiency)],
        "answers": [block for _, group in groups for block in _answers(aggregation, group)],
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


def _pareto(cells: pd.DataFrame, efficiency: pd.DataFrame) -> dict[str, Any] | None:
    """Data of the interactive plot: one series per method, one point per budget."""
    points = pareto_points(cells, efficiency)
    points = points[points["share"].notna()]
    if len(points) < 2:
        return None
    factor, unit = unit_scale(points["flops"], FLOPS_UNITS)
    axes = [
        ("flops", f"{unit} per question"),
        ("tokens", "visual tokens per layer"),
        ("milliseconds", "ms, end to end"),
    ]
    look = styles(cells)
    series = []
    for label, line in points.groupby("method", sort=False):
        rows = []
        for point in line.sort_values("flops").to_dict("records"):
            values = {
                "flops": point["flops"] / factor,
                "tokens": point["tokens"],
                "milliseconds": point["milliseconds"],
            }
            values = {key: round(value, 6) if math.isfinite(value) else None for key, value in values.items()}
            cost = "<br>".join(f"{value:.4g} {name}" for (key, name) in axes if (value := values[key]) is not None)
            # Plotly reads a little HTML in its texts: a label must not be taken for some.
            heading = escape_html(f"{label}, keep {budget(point['keep'])}")
            hover = f"<b>{heading}</b><br>{point['share']:.1f} % of dense<br>{cost}"
            rows.append({**values, "share": round(point["share"], 4), "hover": hover})
        series.append({"name": escape_html(label), "color": look[label]["color"], "points": rows})
    used = [axis for axis in axes if any(point[axis[0]] is not None for one in series for point in one["points"])]
    return {"axes": used, "series": series} if used else None


def _with_images(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    names = sorted({example["image"] for example in found["examples"]})
    return {**found, "images": {name: data_address((folder / name).read_bytes()) for name in names}}


def data_address(content: bytes) -> str:
    """A PNG as a ``data:`` address."""
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def _figures(suffix: str, cells: pd.DataFrame, efficiency: pd.DataFrame) -> list[tuple[str, str]]:
    made = []
    for name, figure in all_figures(cells, efficiency).items():
        if name.startswith("pareto"):
            continue  # the page has an interactive one
        made.append((f"{name}{suffix}".replace("_", " "), data_address(png(figure))))
    return made


def _answers(aggregation: Aggregation, group: pd.DataFrame) -> list[dict[str, Any]]:
    """Per benchmark: questions on which the methods' answers differ in score."""
    rows = methods_of(group)
    rows = rows.groupby("method", sort=False).tail(1)
    blocks = []
    for benchmark in benchmark_order(group["benchmark"]):
        at = group[(group["benchmark"] == benchmark) & (group["status"] == "done")].set_index("row")
        chosen = [row for row in rows.itertuples() if row.row in at.index]
        columns = ["doc_id", "prompt", "prediction", "target", "score"]
        read = [aggregation.results.samples(at.loc[row.row, "folder"], columns) for row in chosen]
        tables = [
            (row, table.to_pandas().set_index("doc_id")) for row, table in zip(chosen, read, strict=True) if table
        ]
        if len(tables) > 1 and all(table.index.is_unique for _, table in tables):
            blocks.append(_disagreements(f"{title(benchmark)}, {at['model'].iloc[0]}", tables))
    return [block for block in blocks if block["rows"]]


def _disagreements(heading: str, tables: Sequence[tuple[Any, pd.DataFrame]]) -> dict[str, Any]:
    scores = pd.concat([table["score"] for _, table in tables], axis=1, join="inner")
    differ = scores.index[scores.nunique(axis=1).to_numpy() > 1][:QUESTIONS_SHOWN]
    first = tables[0][1]
    rows = []
    for doc in differ:
        answers = [(str(table.loc[doc, "prediction"]), table.loc[doc, "score"] >= 0.5) for _, table in tables]
        about = {"doc_id": int(doc), "prompt": str(first.loc[doc, "prompt"]), "target": str(first.loc[doc, "target"])}
        rows.append({**about, "answers": answers})
    labels = [row.method if row.keep is None else f"{row.method} · {budget(row.keep)}" for row, _ in tables]
    return {"title": heading, "labels": labels, "rows": rows}


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
    packages = sorted({f"{name} {version}" for versions in cells["versions"] for name, version in versions.items()})
    sources = {
        "Models": sorted({f"{row.model} ({row.dtype})" if row.dtype else row.model for row in cells.itertuples()}),
        "Data": sorted({f"{row.data} {row.version}".strip() for row in cells.itertuples()})[:12],
        "Hardware": sorted(set(cells["hardware"])),
        "Git commits": sorted(set(cells["git_commit"]) - {""}),
        "Packages": packages,
        "Last cell finished": [max(cells["finished"], default="")],
    }
    return [(name, ", ".join(values)) for name, values in sources.items() if any(values)]
