"""The heat map: methods and budgets by benchmarks, in percent of dense."""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from corematching.results.accuracy import methods_of
from corematching.results.figures.about import about_cells
from corematching.results.figures.canvas import STYLE, ShownFigure, finish, new_figure
from corematching.results.figures.text import name_of, shown, width, wrapped
from corematching.results.titles import benchmark_order, title

BEYOND = 0.04
"""Share of values at either end that may lie beyond the colours, so that a few outliers do not flatten the rest."""
FIELD = 0.62
"""Width of a field in inches."""


def heat_map(cells: pd.DataFrame) -> ShownFigure | None:
    """Score in percent of dense; ``None`` without dense or with a single benchmark.

    Colours span the values met but for a few outliers, which are marked ▼ and ▲; a field without a score shows a dash.
    """
    names = benchmark_order(cells["benchmark"])
    dense = cells[(cells["method_name"] == "dense") & (cells["value"] > 0)].set_index("benchmark")["value"]
    rows = methods_of(cells[cells["method_name"] != "dense"])
    if dense.empty or rows.empty or len(names) < 2:
        return None
    dense = dense[~dense.index.duplicated()]
    values = cells.pivot_table(index="row", columns="benchmark", values="value", aggfunc="last")
    values = values.reindex(index=rows["row"], columns=names).to_numpy(dtype=float)
    share = values / dense.reindex(names).to_numpy() * 100
    low, high = colour_range(share)
    labels = [wrapped(name_of(row.method, row.keep), 2.8, 8) for row in rows.itertuples()]
    side = max(width(line, 8) for label in labels for line in label.split("\n"))
    edges = np.cumsum([0.0, *(0.08 + 0.135 * (label.count("\n") + 1) for label in labels)])
    figure = new_figure(max(side + FIELD * len(names) + 1.1, 5.2), 0.7 + edges[-1])
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        axes = figure.subplots()
        axes.set_facecolor("#ececec")
        image = axes.pcolormesh(range(len(names) + 1), edges, share, cmap="cividis", vmin=low, vmax=high)
        axes.set_ylim(edges[-1], 0)
        middles = (edges[1:] + edges[:-1]) / 2
        _write(axes, share, middles, low, high, image)
        headings = [wrapped(shown(title(name)), FIELD - 0.06, 7) for name in names]
        axes.set_xticks(np.arange(len(names)) + 0.5, headings, fontsize=7)
        axes.set_yticks(middles, labels, fontsize=8)
        axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        axes.spines[:].set_visible(False)
        for place in _block_ends(rows["keep"]):
            axes.axhline(edges[place], color="white", linewidth=2.5)
        below, above = bool(np.nanmin(share) < low), bool(np.nanmax(share) > high)
        extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get((below, above), "neither")
        shrink = min(1.0, 4 / figure.get_figheight())
        figure.colorbar(image, ax=axes, label="% of dense", shrink=shrink, anchor=(0, 1), extend=extend, aspect=24)
    remark = "▼ ▲: beyond the colours" if below or above else ""
    finish(figure, about_cells(cells).adding("intervals: see the tables", remark))
    return figure


def colour_range(share: np.ndarray) -> tuple[float, float]:
    """The values at the ends of the colours: multiples of 5 around all but :data:`BEYOND` of the values."""
    known = share[np.isfinite(share)]
    low, high = np.quantile(known, [BEYOND, 1 - BEYOND]) if len(known) else (95.0, 100.0)
    low, high = 5 * math.floor(low / 5), 5 * math.ceil(high / 5)
    return float(low), float(max(high, low + 5))


def _write(axes: Axes, share: np.ndarray, middles: np.ndarray, low: float, high: float, image: Any) -> None:
    """The number of every field, in a colour that can be read on the field's own."""
    norm = Normalize(low, high, clip=True)
    for (row, column), value in np.ndenumerate(share):
        known = math.isfinite(value)
        red, green, blue, _ = image.cmap(norm(value)) if known else (1, 1, 1, 1)
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        arrow = ("▼" if value < low else "▲" if value > high else "") if known else ""
        text = f"{value:.0f}{arrow}" if known else "—"
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7, "color": "white" if dark else "black"}
        axes.text(column + 0.5, float(middles[row]), text, **style)


def _block_ends(keeps: pd.Series) -> list[int]:
    """Places of the rows at which another budget begins."""
    texts = [str(keep) for keep in keeps]
    return [place for place in range(1, len(texts)) if texts[place] != texts[place - 1]]
