"""What the traces say per decoder layer: visual tokens that enter it, and FFN neurons that decode uses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from corematching.results.accuracy import CONTROLS, methods_of
from corematching.results.figures.about import about_cells
from corematching.results.figures.canvas import STYLE, ShownFigure, finish, hollow, new_figure
from corematching.results.figures.looks import styles
from corematching.results.figures.text import name_of, width, wrapped
from corematching.results.tables import budget

LETTERS = 7
"""Size of the labels beside the lines, in points."""
LINE = 0.125
"""Height of one line of a label in inches."""
WIDEST = 3.4
"""Width at which labels break, in inches."""

Curves = dict[tuple[float, ...], list[Any]]
"""Rows of the tables by the curve that they share."""


def layers(cells: pd.DataFrame) -> ShownFigure | None:
    """Visual tokens entering (prefill) and FFN neurons used (decode), each line labelled at its end.

    The smallest budget of each method shows its shape best. Methods with one and the same curve share a line, whose
    label names them all; dense is the reference.
    """
    traced = cells[cells["visual_tokens_by_layer"].map(bool)]
    if traced.empty:
        return None
    rows = methods_of(traced).groupby("method", sort=False).tail(1)
    look = styles(cells)
    tokens, neurons = _curves(traced, rows)
    panels: list[tuple[str, Curves, str]] = [("visual tokens entering", tokens, "")]
    if neurons:
        everyone = [row.method for row in rows.itertuples() if row.method not in _members(neurons)]
        panels.append(("FFN neurons in decode", neurons, _whole(everyone, rows)))
    remark = "" if neurons else "FFN neurons in decode: all, in every layer"
    texts = [[_label(own) for own in curves.values()] for _, curves, _ in panels]
    heights = [max(1.9, LINE * sum(text.count("\n") + 1.6 for text in own)) + 0.3 for own in texts]
    side = max(width(line, LETTERS) for own in texts for text in own for line in text.split("\n"))
    figure = new_figure(4.4 + side, sum(heights) + 0.4)
    with mpl.rc_context(STYLE):
        drawn = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights).ravel()
        for axes, (heading, curves, note), own, height in zip(drawn, panels, texts, heights, strict=True):
            _panel(axes, curves, own, look, height)
            axes.set_ylabel(heading)
            if note:
                axes.set_title(wrapped(note, 4.2 + side, LETTERS), fontsize=LETTERS, loc="left")
        drawn[-1].set_xlabel("decoder layer")
    finish(figure, about_cells(cells).adding("means over questions and benchmarks", remark))
    return figure


def _curves(traced: pd.DataFrame, rows: pd.DataFrame) -> tuple[Curves, Curves]:
    """Rows of the tables by their curve, for tokens and for neurons; the latter empty if nobody leaves neurons out.

    A layer that computes all neurons counts as the FFN's width, where the traces know it (older ones do not).
    """
    tokens: Curves = {}
    neurons: Curves = {}
    width_of = traced["ffn_width"].max()
    for row in rows.itertuples():
        own = traced[traced["row"] == row.row]
        entering = np.array(own["visual_tokens_by_layer"].tolist(), dtype=float).mean(axis=0)
        tokens.setdefault(tuple(entering.round(1)), []).append(row)
        used = np.array([layer for layer in own["neurons_by_layer"] if layer], dtype=float)
        counts = np.where(np.isnan(used), width_of, used)
        if used.size and np.isfinite(counts).any():
            means = np.ma.masked_invalid(counts).mean(axis=0).round(1)
            # One and the same "nan" for all: two of them are never equal.
            neurons.setdefault(tuple(math.nan if value is None else value for value in means.tolist()), []).append(row)
    reduced = any(value < width_of for curve in neurons for value in curve) if width_of == width_of else bool(neurons)
    return tokens, neurons if reduced else {}


def _members(curves: Curves) -> set[str]:
    return {row.method for own in curves.values() for row in own}


def _first(rows: Sequence[Any]) -> Any:
    """The row whose look a shared line has: the first that is no control."""
    return next((row for row in rows if row.method_name not in CONTROLS), rows[0])


def _label(rows: Sequence[Any]) -> str:
    """Names of the rows that share a line, controls last; a budget is named once where they have one in common."""
    ordered = sorted(rows, key=lambda row: row.method_name in CONTROLS)
    common = len({budget(row.keep) for row in rows}) == 1
    names = [name_of(row.method, None if common else row.keep) for row in ordered[:-1]]
    return wrapped(", ".join([*names, name_of(ordered[-1].method, ordered[-1].keep)]), WIDEST, LETTERS)


def _whole(everyone: Sequence[str], rows: pd.DataFrame) -> str:
    """Who uses all neurons, in words: a trace does not say how many those are."""
    if not everyone:
        return ""
    named = [name_of(label) for label in everyone]
    return f"All neurons, in every layer: {', '.join(named[:6])}" + (f" and {len(named) - 6} more" if named[6:] else "")


def _panel(axes: Axes, curves: Curves, texts: list[str], look: Mapping, height: float) -> None:
    depth = max(len(curve) for curve in curves)
    axes.set_xlim(-0.4, depth - 0.6)
    top = max(np.nanmax(curve) for curve in curves)
    axes.set_ylim(0, 1.06 * top)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    ends = []
    for curve, own in curves.items():
        style = hollow(look[_first(own).method], markersize=3.5)
        if own[0].method_name == "dense":
            style |= {"linestyle": "--", "linewidth": 1.4}
        axes.plot(np.arange(len(curve)), curve, drawstyle="steps-mid", **style)
        known = [value for value in curve if value == value]
        ends.append(known[-1])
    lines = [text.count("\n") + 1.6 for text in texts]
    places = spread(np.array(ends) / (1.06 * top), np.array(lines) * LINE / (height - 0.3))
    for end, place, text, own in zip(ends, places, texts, curves.values(), strict=True):
        colour = look[_first(own).method]["color"]
        axes.text(1.045, place, text, fontsize=LETTERS, color=colour, va="center", transform=axes.transAxes)
        leader = {"linewidth": 0.6, "color": colour, "transform": axes.transAxes, "clip_on": False}
        axes.plot([1.0, 1.035], [end / (1.06 * top), place], **leader)


def spread(wanted: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Middles of labels, as near to the ``wanted`` ones as their ``heights`` allow, in the same order."""
    order = np.argsort(wanted, kind="stable")
    places = np.empty(len(wanted))
    floor = 0.0
    for index in order:
        places[index] = max(wanted[index], floor + heights[index] / 2)
        floor = places[index] + heights[index] / 2
    ceiling = max(1.0, float(heights.sum()))
    for index in order[::-1]:
        places[index] = min(places[index], ceiling - heights[index] / 2)
        ceiling = places[index] - heights[index] / 2
    return places
