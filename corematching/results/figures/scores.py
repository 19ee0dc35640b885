"""Score over the budget: what was really kept per layer, and the nominal budget as a second view."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from corematching.results.figures.about import about_cells
from corematching.results.figures.canvas import STYLE, ShownFigure, finish, hollow, key, new_figure
from corematching.results.figures.looks import styles
from corematching.results.figures.text import name_of, shown, wrapped
from corematching.results.load import keep_order
from corematching.results.titles import benchmark_order, title

PANEL = (2.35, 2.1)
"""Width and height of one benchmark's panel in inches."""
SPREAD = 0.05
"""How far methods at one budget are moved apart, as a share of the budget, so that their intervals can be seen."""


def accuracy_over_tokens(cells: pd.DataFrame) -> ShownFigure | None:
    """One panel per benchmark: score over the visual tokens per layer that the traces show, with 95 % intervals.

    Methods that keep all visual tokens (neurons, KV cache) have no place on this axis and are left out.
    """
    most = cells["visual_tokens_per_layer"].max()
    fewest = cells.groupby("method")["visual_tokens_per_layer"].transform("min")
    chosen = cells["visual_tokens_per_layer"].notna() & (fewest < 0.99 * most)
    places = cells["visual_tokens_per_layer"].where(chosen)
    return _panels(cells, places, "visual tokens entering a layer, mean over layers", _round_numbers)


def accuracy_over_keep(cells: pd.DataFrame) -> ShownFigure | None:
    """The same over the nominal budget, the count of visual tokens that a method was asked to keep."""
    counts = cells["keep"].map(lambda keep: float(keep) if keep_order(keep)[0] == 1 else math.nan)
    return _panels(cells, counts, "visual tokens to keep (nominal)", sorted)


def accuracy_over_fraction(cells: pd.DataFrame) -> ShownFigure | None:
    """The same over the nominal budget where that is a kept fraction, of tokens or of neurons."""
    fractions = cells["keep"].map(lambda keep: 100 * float(keep) if keep_order(keep)[0] == 2 else math.nan)
    return _panels(cells, fractions, "% to keep (nominal)", sorted)


def _panels(
    cells: pd.DataFrame, places: pd.Series, heading: str, ticks: Callable[[set[float]], list[float]]
) -> ShownFigure | None:
    compared = cells["method_name"] != "dense"
    swept = cells.assign(place=places.astype(float))[compared & places.notna() & cells["value"].notna()]
    if swept["place"].nunique() < 2:
        return None
    names = benchmark_order(swept["benchmark"])
    columns = min(len(names), 4)
    rows = math.ceil(len(names) / columns)
    look = styles(cells)
    figure = new_figure(max(PANEL[0] * columns + 0.4, 5.4), PANEL[1] * rows + 0.2)
    with mpl.rc_context(STYLE):
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
        for place, (axes, name) in enumerate(zip(panels, names, strict=False)):
            _panel(axes, cells[cells["benchmark"] == name], swept[swept["benchmark"] == name], look)
            axes.set_xscale("log", base=2)
            axes.set_xlim(swept["place"].min() / (1 + 3 * SPREAD), swept["place"].max() * (1 + 3 * SPREAD))
            marks = ticks(set(swept["place"]))
            axes.xaxis.set(major_locator=FixedLocator(marks), minor_locator=NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:.4g}"))
            axes.tick_params(labelsize=8, labelbottom=place + columns >= len(names))
            if place % columns == 0:
                axes.set_ylabel("score", fontsize=8)
            if place + columns >= len(names):
                axes.set_xlabel(wrapped(heading, PANEL[0] - 0.3, 8), fontsize=8)
        for axes in panels[len(names) :]:
            axes.set_visible(False)
    labels = [label for label in cells["method"].unique() if label in set(swept["method"])]
    dense = cells[compared.eq(False)]["method"].unique()
    entries = [(key(look[label], marker="", linewidth=1.4), name_of(label)) for label in dense]
    entries += [(key(look[label], markersize=5), name_of(label)) for label in sorted(labels)]
    remark = "bars and band: 95 % intervals" if swept["low"].notna().any() else "no interval"
    finish(figure, about_cells(cells).adding(remark), entries)
    return figure


def _panel(axes: Axes, cells: pd.DataFrame, swept: pd.DataFrame, look: Mapping[str, dict]) -> None:
    scale = float(cells["scale"].max()) if cells["scale"].notna().any() else 100.0
    dense = cells[(cells["method_name"] == "dense") & cells["value"].notna()]
    for row in dense.itertuples():
        axes.axhline(row.value, linewidth=1.4, color=look[row.method]["color"], clip_on=False)
        axes.axhspan(row.low, row.high, color=look[row.method]["color"], alpha=0.07, linewidth=0)
    labels = sorted(swept["method"].unique())
    for place, label in enumerate(labels):
        line = swept[swept["method"] == label].sort_values("place")
        value = line["value"].to_numpy()
        ends = line[["low", "high"]].to_numpy().T.clip(0, max(scale, value.max()))
        x = line["place"] * (1 + SPREAD * (2 * (place + 0.5) / len(labels) - 1))
        drawn = axes.errorbar(x, value, np.abs(ends - value), elinewidth=0.7, **hollow(look[label], markersize=4.5))
        drawn.lines[0].set_clip_on(False)
    known = pd.concat([swept, dense])
    low = np.nanmin(known[["low", "value"]].to_numpy())
    high = np.nanmax(known[["high", "value"]].to_numpy())
    room = 0.06 * (high - low) or 0.01 * scale
    axes.set_ylim(max(low - room, 0), min(high + room, max(scale, known["value"].max())))
    missing = swept["low"].isna()
    said = " (no interval)" if missing.all() else f" ({missing.sum()} without interval)" if missing.any() else ""
    axes.set_title(wrapped(shown(title(swept["benchmark"].iloc[0])) + said, PANEL[0] - 0.3, 9), fontsize=9)


def _round_numbers(places: set[float]) -> list[float]:
    """Powers of two in the range, with numbers between them if those are few."""
    first, last = math.floor(math.log2(max(min(places), 1))), math.ceil(math.log2(max(places)))
    step = math.ceil((last - first + 1) / 7)
    between = (1.0, 1.25, 1.5, 1.75) if last - first < 3 else (1.0, 1.5) if last - first < 4 else (1.0,)
    return [factor * 2.0**power for power in range(first, last + 1, step) for factor in between]
