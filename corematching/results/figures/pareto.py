"""Accuracy against cost: the points behind the trade-off plots, and the plots."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from corematching.results.accuracy import accuracy_shares, dense_values, methods_of
from corematching.results.figures.about import about_cells
from corematching.results.figures.canvas import STYLE, ShownFigure, finish, hollow, key, new_figure
from corematching.results.figures.looks import styles
from corematching.results.figures.text import name_of
from corematching.results.tables import FLOPS_UNITS, budget, unit_scale

#: Hollow markers nearer than this would be taken for one; in points of the page.
APART = 4.5


def pareto_points(cells: pd.DataFrame, efficiency: pd.DataFrame | None = None) -> pd.DataFrame:
    """One point per method and budget: mean share of dense (%), FLOPs per question, and latency where it was measured.

    Returns
    -------
    pandas.DataFrame
        Columns ``method``, ``method_name``, ``keep``, ``share``, ``half`` (of the share's 95 % interval, NaN where
        nothing can be said), ``flops``, ``tokens``, ``milliseconds``. Latency is the median end-to-end time at the
        longest output length measured for the same model.
    """
    shares, halves = accuracy_shares(cells), _halves(cells)
    means = cells.groupby("row", sort=False)[["flops_total", "visual_tokens_per_layer"]].mean()
    rows = methods_of(cells)
    points = rows[["row", "method", "method_name", "keep"]].assign(
        share=[shares.get(row, math.nan) for row in rows["row"]],
        half=[halves.get(row, math.nan) for row in rows["row"]],
        flops=means["flops_total"].reindex(rows["row"]).to_numpy(),
        tokens=means["visual_tokens_per_layer"].reindex(rows["row"]).to_numpy(),
    )
    times = _latencies(cells, efficiency)
    latency = [
        times.get((method, budget(keep)), math.nan)
        for method, keep in zip(points["method"], points["keep"], strict=True)
    ]
    return points.assign(milliseconds=latency).reset_index(drop=True)


def _latencies(cells: pd.DataFrame, efficiency: pd.DataFrame | None) -> Mapping[tuple[str, str], float]:
    if efficiency is None or not len(efficiency):
        return {}
    measured = (efficiency["regime"] == "resident") & (efficiency["predicted"] != True)  # noqa: E712 (a column)
    same = efficiency[efficiency["model"].isin(cells["model"]) & measured & (efficiency["batch"] == 1)]
    longest = same[same["output_tokens"] == same["output_tokens"].max()]
    keys = zip(longest["method"], map(budget, longest["keep"]), strict=True)
    return dict(zip(keys, longest["end_to_end_ms"], strict=True))


def _halves(cells: pd.DataFrame) -> dict[str, float]:
    """Half of each row's interval: of the benchmarks' paired intervals, as shares of dense, averaged as independent."""
    base = dense_values(cells)
    halves = {}
    for row, own in cells.groupby("row", sort=False):
        widths = dict(zip(own["benchmark"], own["difference_high"] - own["difference_low"], strict=True))
        squares = [(widths.get(name, math.nan) / 2 / value) ** 2 for name, value in base.items()]
        if squares and sum(squares) > 0:  # false for NaN: a benchmark without an interval leaves the mean without one
            halves[str(row)] = 100 * math.sqrt(sum(squares)) / len(squares)
    return halves


def pareto(cells: pd.DataFrame, efficiency: pd.DataFrame | None = None, against: str = "flops") -> ShownFigure | None:
    """Mean share of dense accuracy against FLOPs or measured latency (``against="milliseconds"``)."""
    points = pareto_points(cells, efficiency)
    points = points[points["share"].notna() & points[against].notna()].reset_index(drop=True)
    if len(points) < 2:
        return None
    factor, unit = unit_scale(points["flops"], FLOPS_UNITS) if against == "flops" else (1.0, "ms, end to end,")
    look = styles(cells)
    crowded = points["method"].nunique() > 12
    size = (8.6, 5.4) if crowded else (6.4, 3.8)
    figure = new_figure(*size)
    with mpl.rc_context(STYLE):
        axes = figure.subplots()
        cost, share = points[against].to_numpy() / factor, points["share"].to_numpy()
        _limits(axes, cost, share, points["half"].fillna(0).to_numpy())
        front = frontier(cost, share)
        wide: Any = {"color": "#d8d8d8", "linewidth": 5, "solid_capstyle": "round", "zorder": 0}
        (line,) = axes.plot(cost[front], share[front], **wide)
        moved = side_by_side(axes, cost, share, (size[0] * 60, size[1] * 58))
        for label, own in points.groupby("method", sort=False):
            order = own.sort_values(against).index
            lone = {"linestyle": "none"} if len(own) == 1 else {}
            axes.errorbar(
                moved[order], share[order], own.loc[order, "half"], elinewidth=0.7, **hollow(look[label], **lone)
            )
        axes.set(xlabel=f"{unit} per question", ylabel="% of dense accuracy, mean over benchmarks")
    entries = [(key(look[label]), name_of(label)) for label in points["method"].unique()]
    finish(figure, about_cells(cells).adding(*_remarks(points, moved, cost)), [*entries, (line, "Pareto front")])
    return figure


def _remarks(points: pd.DataFrame, moved: np.ndarray, cost: np.ndarray) -> list[str]:
    without = points[points["half"].isna() & (points["method_name"] != "dense")]
    compared = int((points["method_name"] != "dense").sum())
    remarks = ["bars: 95 % of the difference from dense"] if len(without) < compared else []
    if len(without):
        remarks.append("no interval" + (f" for {len(without)} of {compared} points" if remarks else ""))
    if not np.allclose(moved, cost):
        remarks.append("points that would hide each other stand side by side")
    return remarks


def _limits(axes: Axes, cost: np.ndarray, share: np.ndarray, half: np.ndarray) -> None:
    """Fix the axes' ranges, so that places can be counted in points of the page."""
    for set_limits, low, high in (
        (axes.set_xlim, cost.min(), cost.max()),
        (axes.set_ylim, (share - half).min(), (share + half).max()),
    ):
        margin = 0.06 * (high - low) or 1.0
        set_limits(low - margin, high + margin)


def side_by_side(axes: Axes, x: np.ndarray, y: np.ndarray, page: tuple[float, float]) -> np.ndarray:
    """Horizontal places at which no marker lies on another: those that would are moved sideways, by as little as helps.

    Parameters
    ----------
    axes
        With its limits set.
    x, y
        The points.
    page
        Width and height of the panel in points of the page.
    """
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    across, up = page[0] / (right - left), page[1] / (top - bottom)
    places = np.empty(len(x))
    for index in range(len(x)):
        near = [other for other in range(index) if abs(y[other] - y[index]) * up < APART]
        # 0, +1, -1, +2, ... steps: the first place that no earlier point holds.
        for step in range(2 * len(x) + 1):
            place = x[index] + (step + 1) // 2 * (1 if step % 2 else -1) * APART / across
            if all(abs(places[other] - place) * across >= APART * 0.99 for other in near):
                break
        places[index] = place
    return places


def frontier(cost: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Indices of the points that no other beats at no more cost, by rising cost."""
    order = np.lexsort((-quality, cost))
    best, front = -math.inf, []
    for index in order:
        if quality[index] > best:
            best = quality[index]
            front.append(index)
    return np.array(front, dtype=int)
