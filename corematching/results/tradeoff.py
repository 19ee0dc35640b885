"""Data of the report's interactive plot: accuracy against cost, one series per method, one point per budget."""

from __future__ import annotations

import math
import textwrap
from typing import Any

import pandas as pd

from corematching.results.figures import pareto_points, styles
from corematching.results.figures.looks import SYMBOLS
from corematching.results.figures.text import name_of
from corematching.results.render import escape_html
from corematching.results.tables import FLOPS_UNITS, budget, unit_scale

LINE = 34
"""Letters in a line of the plot's legend."""


def tradeoff(cells: pd.DataFrame, efficiency: pd.DataFrame) -> dict[str, Any] | None:
    """What the page's script draws; ``None`` below two points.

    Returns
    -------
    dict or None
        ``axes``: key and name of every horizontal axis with numbers; ``series``: per method its name, look and points.
    """
    points = pareto_points(cells, efficiency)
    points = points[points["share"].notna()]
    if len(points) < 2:
        return None
    factor, unit = unit_scale(points["flops"], FLOPS_UNITS)
    axes = {"flops": f"{unit} per question", "tokens": "visual tokens per layer", "milliseconds": "ms, end to end"}
    look = styles(cells)
    series: list[dict[str, Any]] = []
    for label, line in points.assign(flops=points["flops"] / factor).groupby("method", sort=False):
        drawn = [_point(str(label), point, axes) for point in line.sort_values("flops").to_dict("records")]
        # Plotly reads a little HTML in its texts: a label must not be taken for some.
        name = "<br>".join(escape_html(part) for part in textwrap.wrap(name_of(str(label)), LINE))
        symbol = SYMBOLS[look[str(label)]["marker"]]
        series.append({"name": name, "color": look[str(label)]["color"], "symbol": symbol, "points": drawn})
    known = {key for one in series for point in one["points"] for key in axes if point[key] is not None}
    return {"axes": [pair for pair in axes.items() if pair[0] in known], "series": series} if known else None


def _point(label: str, point: dict[str, Any], axes: dict[str, str]) -> dict[str, Any]:
    values = {key: round(point[key], 6) if math.isfinite(point[key]) else None for key in axes}
    cost = [f"{value:.4g} {escape_html(axes[key])}" for key, value in values.items() if value is not None]
    half = round(point["half"], 4) if math.isfinite(point["half"]) else None
    interval = "no interval" if half is None else f"± {half:.1f}"
    heading = escape_html(f"{name_of(label)}, keep {budget(point['keep'])}")
    hover = "<br>".join([f"<b>{heading}</b>", f"{point['share']:.1f} % of dense ({interval})", *cost])
    return {**values, "share": round(point["share"], 4), "half": half, "hover": hover}
