"""Speed-ups over dense by device, of predicted rows: where a method gains, and what was published there."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from corematching.results.columns import DECODE_SPEEDUP, PREFILL_SPEEDUP, SPEEDUP, Quantity
from corematching.results.figures.about import about_efficiency
from corematching.results.figures.canvas import STYLE, WARNING, ShownFigure, finish, hollow, key, new_figure
from corematching.results.figures.looks import styles
from corematching.results.figures.text import name_of, shown, wrapped
from corematching.results.published_speed import load_published_speed

SHOWN = (PREFILL_SPEEDUP, DECODE_SPEEDUP, SPEEDUP)
PUBLISHED: dict[str, Any] = {"marker": "|", "color": WARNING, "markersize": 16, "markeredgewidth": 2}
APART = 0.09
"""How far methods lie apart in a device's lane, of its height."""


def speedup_by_device(efficiency: pd.DataFrame) -> ShownFigure | None:
    """Prefill, decode and end-to-end speed-up of predicted rows, at the longest answer; ``None`` below two devices."""
    rows = efficiency[(efficiency["predicted"] == True) & efficiency[SPEEDUP.key].notna()]  # noqa: E712  # objects
    rows = rows[(rows["output_tokens"] == rows["output_tokens"].max()) & (rows["method_name"] != "dense")]
    models, devices = sorted(rows["model"].unique()), sorted(rows["device"].unique(), reverse=True)
    if len(devices) < 2:
        return None
    look, names = styles(efficiency), [shown(name).removeprefix("NVIDIA ") for name in devices]
    figure = new_figure(7.2, len(models) * (0.6 + 0.42 * len(devices)))
    published = load_published_speed()
    with mpl.rc_context(STYLE):
        grid = figure.subplots(len(models), len(SHOWN), squeeze=False, sharey=True, sharex="col")
        for line, model in zip(grid, models, strict=True):
            for axes, what in zip(line, SHOWN, strict=True):
                _lanes(axes, rows[rows["model"] == model], what, devices, look)
                _mark_published(axes, published, what, devices)
                axes.set_xlabel(f"{what.name} (x dense)" if model == models[-1] else "")
            line[0].set_yticks(range(len(devices)), names, fontsize=8)
            line[0].set_ylim(-0.5, len(devices) - 0.5)
            line[0].set_title(wrapped(f"{shown(model)}, {rows['output_tokens'].max()} tokens", 3, 8), fontsize=8, loc="left")
    labelled = rows.drop_duplicates(["method", "keep"]).sort_values("method")
    entries = [(key(look[row.method], linestyle="none"), name_of(row.method, row.keep)) for row in labelled.itertuples()]
    if published["device"].isin(devices).any():
        entries.append((Line2D([], [], linestyle="none", **PUBLISHED), "published for corematching (stated or secondary)"))
    finish(figure, about_efficiency(rows).adding("predicted by the roofline model, nothing was run there"), entries)
    return figure


def _lanes(axes: Axes, rows: pd.DataFrame, what: Quantity, devices: list[str], look: dict) -> None:
    """One lane per device, methods a little apart in it."""
    lines = sorted(rows[["method", "keep"]].astype(str).drop_duplicates().itertuples(index=False))
    for place, (method, keep) in enumerate(lines):
        own = rows[(rows["method"] == method) & (rows["keep"].astype(str) == keep)]
        heights = [devices.index(name) - APART * (place - (len(lines) - 1) / 2) for name in own["device"]]
        axes.plot(own[what.key], heights, **hollow(look[method], linestyle="none"))
    axes.axvline(1.0, color="#111111", linewidth=0.9)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    axes.tick_params(axis="y", length=0)


def _mark_published(axes: Axes, published: pd.DataFrame, what: Quantity, devices: list[str]) -> None:
    for figure in published[published["quantity"] == what.key].itertuples():
        if figure.device in devices:
            axes.plot(figure.value, devices.index(str(figure.device)), linestyle="none", zorder=0, **PUBLISHED)
