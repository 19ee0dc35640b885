"""Figures of the efficiency rows: where time goes, speed-up over the visual budget, decode against what bytes allow.

All show medians; bars are the distance between the quartiles of the repeats, where the rows know it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from corematching.results.device_figure import speedup_by_device
from corematching.results.figures.about import about_efficiency
from corematching.results.figures.canvas import STYLE, ShownFigure, finish, hollow, key, new_figure, save
from corematching.results.figures.looks import styles
from corematching.results.figures.text import name_of, shown, width, wrapped
from corematching.results.hardware import SETTING, setting_title

NEURON_METHODS = ("core_neurons", "coreinfer", "wanda_neurons", "random_neurons", "dejavu", "powerinfer")
PARTS = {"prefill": "#4C78A8", "decode": "#F2B06B"}
"""Colours of the two parts of a run; methods have none of them."""
BAR = 0.19
"""Height of a bar in inches."""
MOST_PANELS = 12
"""More settings than this fill more than a page."""
ACROSS = 7.2
"""Width of the figures in inches, that of a page's text."""

Entries = Sequence[tuple[Artist, str]]


def time_breakdown(efficiency: pd.DataFrame) -> ShownFigure | None:
    """Stacked bars of prefill and decode time per method and budget, one panel per device and output length."""
    shown_rows = efficiency[efficiency["prefill_ms"].notna() & efficiency["decode_ms_per_token"].notna()]
    shown_rows = _longest_if_many(shown_rows)
    if shown_rows.empty:
        return None
    panels = [_dense_first(rows) for _, rows in shown_rows.groupby(SETTING, sort=True)]
    names = {row.Index: wrapped(name_of(row.method, row.keep), 2.4, 8) for row in shown_rows.itertuples()}
    side = max(width(line, 8) for name in names.values() for line in name.split("\n"))
    heights = [sum(_lane(names[index]) for index in rows.index) for rows in panels]
    figure = new_figure(ACROSS + side - 1.4, sum(heights) + 0.45 * len(panels) + 0.3)
    with mpl.rc_context(STYLE):
        drawn = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights).ravel()
        for axes, rows in zip(drawn, panels, strict=True):
            _stack(axes, rows, [names[index] for index in rows.index])
            _heading(figure, axes, rows)
        drawn[-1].set_xlabel("time in ms")
    entries = [(Patch(color=colour), name) for name, colour in PARTS.items()]
    return _finished(figure, shown_rows, ["prefill_ms_iqr", "end_to_end_ms_iqr"], entries)


def _longest_if_many(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows; of more settings than a page holds, those of the longest answers only."""
    if len(rows.groupby(SETTING)) <= MOST_PANELS:
        return rows
    return rows[rows["output_tokens"] == rows["output_tokens"].max()]


def _stack(axes: Axes, rows: pd.DataFrame, names: Sequence[str]) -> None:
    lanes = np.array([_lane(name) for name in names])
    places = np.cumsum(lanes) - lanes / 2
    decode = rows["decode_ms_per_token"] * (rows["output_tokens"].astype(int) - 1)
    axes.barh(places, rows["prefill_ms"], color=PARTS["prefill"], height=BAR)
    axes.barh(places, decode, left=rows["prefill_ms"], color=PARTS["decode"], height=BAR)
    bars: Any = {"fmt": "none", "ecolor": "#222222", "elinewidth": 0.8, "capsize": 1.5}
    axes.errorbar(rows["prefill_ms"], places + BAR / 5, xerr=rows["prefill_ms_iqr"] / 2, **bars)
    axes.errorbar(rows["prefill_ms"] + decode, places - BAR / 5, xerr=rows["end_to_end_ms_iqr"] / 2, **bars)
    axes.set_yticks(places, names, fontsize=8)
    axes.set_ylim(lanes.sum(), 0)
    axes.set_xlim(left=0)
    axes.grid(visible=False, axis="y")


def _lane(name: str) -> float:
    """Height of a bar's lane in inches: that of its name."""
    return max(BAR + 0.06, 0.08 + 0.14 * (name.count("\n") + 1))


def speedup_over_keep(efficiency: pd.DataFrame) -> ShownFigure | None:
    """End-to-end speed-up over dense by visual tokens kept, one panel per output length; ``None`` without budgets."""
    counts = efficiency["keep"].map(lambda keep: isinstance(keep, int) and not isinstance(keep, bool))
    shown_rows = efficiency[counts & efficiency["speedup"].notna()]
    if len(shown_rows.groupby(SETTING)) > MOST_PANELS and shown_rows["keep"].nunique() == 1:
        return None  # a curve of one point per panel: speedup_by_device shows those
    if shown_rows.empty:
        return None
    panels = [rows for _, rows in shown_rows.groupby(SETTING, sort=True)]
    look = styles(efficiency)

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        _curves(axes, rows.assign(keep=rows["keep"].astype(int)), "speedup", "paired_speedup_iqr", look)
        axes.axhline(1.0, color=look.get("dense", {}).get("color", "#111111"), linewidth=0.9)
        axes.set_ylabel("speed-up over dense")

    figure = _stacked(panels, "visual tokens kept", draw)
    return _finished(figure, shown_rows, ["paired_speedup_iqr"], _entries(shown_rows, look))


def decode_over_neurons(efficiency: pd.DataFrame) -> ShownFigure | None:
    """Decode time per token by kept share of the FFN, with the line that the bytes to be read allow.

    The line is the dense time scaled by bytes read: what a method would take that reads at dense's own rate.
    """
    longest = efficiency[efficiency["output_tokens"] == efficiency["output_tokens"].max()]
    timed = longest[longest["decode_ms_per_token"].notna() & longest["decode_gb_per_s"].notna()]
    neurons = timed[timed["method_name"].isin(NEURON_METHODS)]
    dense = timed[timed["method_name"] == "dense"]
    bases = {}
    for setting, rows in neurons.groupby(SETTING, sort=True):
        base = dense[(dense[SETTING] == list(setting)).all(axis=1)]
        if len(base):
            bases[rows.index[0]] = (rows, base.iloc[[-1]])
    if not bases:
        return None
    look = styles(efficiency)

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        base = bases[rows.index[0]][1]
        share = rows.assign(keep=100 * rows["keep"].astype(float))
        _curves(axes, share, "decode_ms_per_token", "decode_ms_per_token_iqr", look)
        _curves(axes, base.assign(keep=100.0), "decode_ms_per_token", "decode_ms_per_token_iqr", look)
        limit = share.sort_values("keep")
        time = base["decode_ms_per_token"].iloc[0]
        allowed = time * _bytes(limit) / _bytes(base).iloc[0]
        axes.plot([*limit["keep"], 100.0], [*allowed, time], color="#999999", linestyle="--", zorder=1)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("decode ms/token")

    figure = _stacked([rows for rows, _ in bases.values()], "kept share of the FFN neurons in %", draw)
    drawn = pd.concat([frame for pair in bases.values() for frame in pair])
    allowed = (key({"color": "#999999"}, linestyle="--", marker=""), "allowed by bytes read")
    return _finished(figure, drawn, ["decode_ms_per_token_iqr"], [*_entries(drawn, look), allowed])


def efficiency_figures(efficiency: pd.DataFrame) -> dict[str, ShownFigure]:
    """Every figure that the rows allow, by file name."""
    makers = (time_breakdown, speedup_over_keep, decode_over_neurons, speedup_by_device)
    made = {make.__name__: make(efficiency) for make in makers}
    return {name: figure for name, figure in made.items() if figure is not None}


def write_efficiency_figures(efficiency: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the figures that the rows allow."""
    return [path for name, figure in efficiency_figures(efficiency).items() for path in save(figure, folder, name)]


def _stacked(panels: Sequence[pd.DataFrame], heading: str, draw: Callable[[Axes, pd.DataFrame], None]) -> ShownFigure:
    """One panel per setting, below each other."""
    figure = new_figure(ACROSS, 2.6 * len(panels))
    with mpl.rc_context(STYLE):
        drawn = figure.subplots(len(panels), 1, squeeze=False).ravel()
        for axes, rows in zip(drawn, panels, strict=True):
            draw(axes, rows)
            _heading(figure, axes, rows)
        drawn[-1].set_xlabel(heading)
    return figure


def _curves(axes: Axes, rows: pd.DataFrame, name: str, quartiles: str, look: dict) -> None:
    """One line per method, moved apart a little so that no method lies under another."""
    apart = 0.012 * ((rows["keep"].max() - rows["keep"].min()) or rows["keep"].max())
    methods = sorted(rows["method"].unique())
    for place, method in enumerate(methods):
        line = rows[rows["method"] == method].sort_values("keep")
        x = line["keep"] + apart * (place - (len(methods) - 1) / 2) / max(1, len(methods) / 6)
        lone = {"linestyle": "none"} if len(line) == 1 else {}
        axes.errorbar(x, line[name], line[quartiles] / 2, elinewidth=0.8, **hollow(look[method], **lone))


def _heading(figure: ShownFigure, axes: Axes, rows: pd.DataFrame) -> None:
    text = wrapped(shown(setting_title(rows.iloc[0])), figure.get_figwidth() - 0.9, 8)
    axes.set_title(text, fontsize=8, loc="left")


def _dense_first(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.sort_values("method_name", key=lambda names: names != "dense", kind="stable")


def _entries(rows: pd.DataFrame, look: dict) -> Entries:
    methods = rows.assign(rest=rows["method_name"] != "dense").sort_values(["rest", "method"])["method"].unique()
    return [(key(look[method]), name_of(method)) for method in methods]


def _finished(figure: ShownFigure, rows: pd.DataFrame, spreads: Sequence[str], entries: Entries) -> ShownFigure:
    known = rows[list(spreads)].notna().any(axis=None)
    remark = "bars: distance between the quartiles" if known else "no spread is known"
    finish(figure, about_efficiency(rows).adding(remark), entries)
    return figure


def _bytes(rows: pd.DataFrame) -> pd.Series:
    """Bytes one decode step reads, up to a common factor."""
    return rows["decode_gb_per_s"] * rows["decode_ms_per_token"]
