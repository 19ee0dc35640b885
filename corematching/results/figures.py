"""Figures of the results, as vector PDF and PNG. Same input, same bytes: no dates, no random ids in the files.

Each function returns a matplotlib figure, or ``None`` where the cells hold nothing to draw; :func:`save` writes it.
Figures that show what a model does inside are in :mod:`corematching.inspection.evidence_figures`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from corematching import files
from corematching.results.accuracy import accuracy_shares, benchmark_order, methods_of, title
from corematching.results.hardware import SETTING, setting_title
from corematching.results.load import keep_order
from corematching.results.tables import FLOPS_UNITS, MINI_BANNER, budget, unit_scale

#: Okabe and Ito's colours, which stay apart for colour-blind readers; controls are grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7B4EA3", "#8C6D31")
GREYS = ("#999999", "#6B6B6B", "#BBBBBB")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: Any = {  # matplotlib types the keys of such dictionaries, one by one
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    # A dollar sign in a label is a dollar sign.
    "text.parse_math": False,
}


def styles(cells: pd.DataFrame) -> dict[str, dict]:
    """Colour and marker of every method label, the same in all figures of one store."""
    rows = methods_of(cells).drop_duplicates("method")
    chosen, greys, colours = {}, 0, 0
    for row in rows.sort_values("method").itertuples():
        if row.method_name == "dense":
            chosen[row.method] = {"color": "#111111", "marker": "*"}
        elif row.method_name in ("random", "uniform", "pooling"):
            chosen[row.method] = {"color": GREYS[greys % len(GREYS)], "marker": MARKERS[greys % 3]}
            greys += 1
        else:
            marker = MARKERS[(colours + colours // len(COLOURS)) % len(MARKERS)]
            chosen[row.method] = {"color": COLOURS[colours % len(COLOURS)], "marker": marker}
            colours += 1
    return chosen


class ShownFigure(Figure):
    """A figure that notebooks show as it is saved, without pyplot."""

    def _repr_png_(self) -> bytes:
        return png(self)


def name_of(method: str, keep: object = None) -> str:
    """A method's label and budget, short enough for a legend."""
    short = method if len(method) <= 34 else method[:33] + "…"
    return short if keep is None or keep != keep else f"{short} · {budget(keep)}"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in the house style, with a canvas of its own (no window, no global state)."""
    with mpl.rc_context(STYLE):
        figure = ShownFigure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``<name>.pdf`` and ``<name>.png`` without dates or versions in their metadata."""
    metadata = {"pdf": {"CreationDate": None, "Producer": None, "Creator": None}, "png": {"Software": None}}
    paths = [folder / f"{name}.{suffix}" for suffix in metadata]
    for path, facts in zip(paths, metadata.values(), strict=True):
        with mpl.rc_context(STYLE), files.replacing(path) as temporary:
            figure.savefig(temporary, metadata=facts)
    return paths


def png(figure: Figure) -> bytes:
    """The figure as a PNG, for pages and trackers."""
    buffer = BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def pareto_points(cells: pd.DataFrame, efficiency: pd.DataFrame | None = None) -> pd.DataFrame:
    """One point per method and budget: mean share of dense (%), FLOPs per question, and latency where it was measured.

    Returns
    -------
    pandas.DataFrame
        Columns ``method``, ``method_name``, ``keep``, ``share``, ``flops``, ``tokens``, ``milliseconds``.
        Latency is the median end-to-end time at the longest output length measured for the same model.
    """
    shares = accuracy_shares(cells)
    means = cells.groupby("row", sort=False)[["flops_total", "visual_tokens_per_layer"]].mean()
    rows = methods_of(cells)
    points = rows[["row", "method", "method_name", "keep"]].assign(
        share=[shares.get(row, math.nan) for row in rows["row"]],
        flops=means["flops_total"].reindex(rows["row"]).to_numpy(),
        tokens=means["visual_tokens_per_layer"].reindex(rows["row"]).to_numpy(),
    )
    times: Mapping = {}
    if efficiency is not None and len(efficiency):
        measured = (efficiency["regime"] == "resident") & (efficiency["predicted"] != True)  # noqa: E712 (a column)
        same = efficiency[efficiency["model"].isin(cells["model"]) & measured]
        longest = same[same["output_tokens"] == same["output_tokens"].max()]
        keys = zip(longest["method"], map(budget, longest["keep"]), strict=True)
        times = dict(zip(keys, longest["end_to_end_ms"], strict=True))
    latency = [
        times.get((method, budget(keep)), math.nan)
        for method, keep in zip(points["method"], points["keep"], strict=True)
    ]
    return points.assign(milliseconds=latency).reset_index(drop=True)


def pareto(cells: pd.DataFrame, efficiency: pd.DataFrame | None = None, against: str = "flops") -> Figure | None:
    """Mean share of dense accuracy against FLOPs or measured latency (``against="milliseconds"``)."""
    points = pareto_points(cells, efficiency)
    points = points[points["share"].notna() & points[against].notna()]
    if len(points) < 2:
        return None
    factor, unit = unit_scale(points["flops"], FLOPS_UNITS) if against == "flops" else (1.0, "ms, end to end")
    figure = new_figure(5.4, 3.7)
    with mpl.rc_context(STYLE):
        axes = figure.subplots()
        look = styles(cells)
        for label, line in points.groupby("method", sort=False):
            line = line.sort_values(against)
            axes.plot(
                line[against] / factor, line["share"], label=name_of(label), linewidth=1.2, markersize=6, **look[label]
            )
        front = frontier(points[against].to_numpy(), points["share"].to_numpy())
        axes.plot(
            *(points[name].to_numpy()[front] / scale for name, scale in ((against, factor), ("share", 1.0))),
            color="#bbbbbb",
            linestyle="--",
            linewidth=4,
            alpha=0.5,
            zorder=0,
            label="Pareto front",
        )
        axes.set(xlabel=f"{unit} per question", ylabel="% of dense accuracy")
        axes.legend(fontsize=8)
        _banner(figure, cells)
    return figure


def frontier(cost: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Indices of the points that no other beats at no more cost, by rising cost."""
    order = np.lexsort((-quality, cost))
    best, front = -math.inf, []
    for index in order:
        if quality[index] > best:
            best = quality[index]
            front.append(index)
    return np.array(front, dtype=int)


def accuracy_over_keep(cells: pd.DataFrame) -> Figure | None:
    """One panel per benchmark: score over the budget with 95 % intervals, dense as a band."""
    numeric = cells["keep"].map(lambda keep: keep_order(keep)[0] in (1, 2)) & (cells["method_name"] != "dense")
    swept = cells[numeric & cells["value"].notna()]
    if swept["keep"].map(float).nunique() < 2:
        return None
    names = benchmark_order(swept["benchmark"])
    columns = min(len(names), 5)
    rows = math.ceil(len(names) / columns)
    figure = new_figure(2.6 * columns + 1.3, 2.4 * rows + 0.4)
    with mpl.rc_context(STYLE):
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        look = styles(cells)
        for axes, name in zip(panels, names, strict=False):
            _keep_panel(axes, cells[cells["benchmark"] == name], swept[swept["benchmark"] == name], look)
            axes.set_title(title(name), fontsize=9)
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        handles = {
            label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
        figure.supxlabel("kept visual tokens (or kept fraction)", fontsize=9)
        figure.supylabel("score", fontsize=9)
        _banner(figure, cells)
    return figure


def _keep_panel(axes, cells: pd.DataFrame, swept: pd.DataFrame, look: Mapping[str, dict]) -> None:
    dense = cells[(cells["method_name"] == "dense") & cells["value"].notna()]
    if len(dense):
        row = dense.iloc[0]
        axes.axhline(row["value"], linewidth=1, label=name_of(row["method"]), color=look[row["method"]]["color"])
        axes.axhspan(row["low"], row["high"], color="#111111", alpha=0.07, linewidth=0)
    for place, (label, line) in enumerate(swept.groupby("method", sort=False)):
        line = line.assign(keep=line["keep"].map(float)).sort_values("keep")
        spread = np.abs(line[["low", "high"]].to_numpy().T - line["value"].to_numpy())
        # A small horizontal shift, so that intervals at one budget do not hide each other.
        x = line["keep"] * 1.03 ** (place - 1)
        axes.errorbar(
            x, line["value"], spread, label=name_of(label), linewidth=1.1, markersize=4, capsize=2, **look[label]
        )
    axes.set_xscale("log", base=2)
    ticks = sorted(set(swept["keep"].map(float)))
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45 if len(ticks) > 5 else 0)
    axes.minorticks_off()


def heat_map(cells: pd.DataFrame) -> Figure | None:
    """Methods and budgets by benchmarks: score in percent of dense; a hatched field has no score."""
    names = benchmark_order(cells["benchmark"])
    dense = cells[(cells["method_name"] == "dense") & (cells["value"] > 0)].set_index("benchmark")["value"]
    rows = methods_of(cells[cells["method_name"] != "dense"])
    if dense.empty or rows.empty:
        return None
    values = cells.pivot_table(index="row", columns="benchmark", values="value", aggfunc="last")
    share = (
        values.reindex(index=rows["row"], columns=names).to_numpy(dtype=float) / dense.reindex(names).to_numpy() * 100
    )
    figure = new_figure(max(1.9 + 0.62 * len(names), 4.6), 1.2 + 0.27 * len(rows))
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        axes = figure.subplots()
        axes.set_facecolor("#eeeeee")
        low = np.nanmin(share, initial=100.0)
        image = axes.imshow(share, cmap="cividis", vmin=min(low, 95.0), vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(share):
            dark = math.isfinite(value) and value < (min(low, 95.0) + 100) / 2
            text = "—" if not math.isfinite(value) else f"{value:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        axes.set_xticks(range(len(names)), [title(name) for name in names], rotation=45, ha="right")
        labels = [name_of(row.method, row.keep) for row in rows.itertuples()]
        axes.set_yticks(range(len(rows)), labels)
        axes.tick_params(length=0)
        figure.colorbar(image, ax=axes, label="% of dense", shrink=0.9)
        _banner(figure, cells)
    return figure


def layers(cells: pd.DataFrame) -> Figure | None:
    """What the traces say per decoder layer: visual tokens entering (prefill) and FFN neurons used (decode)."""
    traced = cells[cells["visual_tokens_by_layer"].map(bool)]
    if traced.empty:
        return None
    rows = methods_of(traced)
    # The smallest budget of each method shows its shape best; more lines would hide each other.
    rows = rows.groupby("method", sort=False).tail(1)
    figure = new_figure(8.4, 3.0)
    with mpl.rc_context(STYLE):
        tokens, neurons = figure.subplots(1, 2)
        look = styles(cells)
        for row in rows.itertuples():
            own = traced[traced["row"] == row.row]
            label = name_of(row.method, row.keep)
            style = {**look[row.method], "markersize": 3, "linewidth": 1.1, "label": label}
            by_layer = np.mean(own["visual_tokens_by_layer"].tolist(), axis=0)
            tokens.plot(np.arange(len(by_layer)), by_layer, drawstyle="steps-mid", **style)
            used = [layer for layer in own["neurons_by_layer"] if layer]
            if any(count is not None for layer in used for count in layer):
                counts = np.ma.masked_invalid(np.array(used, dtype=float)).mean(axis=0)
                neurons.plot(np.arange(len(counts)), counts, drawstyle="steps-mid", **style)
        tokens.set(xlabel="decoder layer", ylabel="visual tokens entering", ylim=(0, None))
        neurons.set(xlabel="decoder layer", ylabel="FFN neurons in decode", ylim=(0, None))
        if not neurons.lines:
            neurons.text(0.5, 0.5, "all neurons, all layers", ha="center", transform=neurons.transAxes)
        figure.legend(*tokens.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
        _banner(figure, cells)
    return figure


def breakdown(efficiency: pd.DataFrame) -> Figure | None:
    """Stacked bars of prefill and decode time per method and budget, one panel per device and output length."""
    shown = efficiency[efficiency["prefill_ms"].notna() & efficiency["decode_ms_per_token"].notna()]
    if shown.empty:
        return None
    settings = list(shown.groupby(SETTING, sort=True))
    figure = new_figure(7.2, sum(0.6 + 0.26 * len(rows) for _, rows in settings))
    with mpl.rc_context(STYLE):
        heights = [len(rows) + 2 for _, rows in settings]
        panels = figure.subplots(len(settings), 1, squeeze=False, gridspec_kw={"height_ratios": heights}).ravel()
        for axes, (_, rows) in zip(panels, settings, strict=True):
            rows = rows.sort_values("method_name", key=lambda names: names != "dense", kind="stable")
            labels = [name_of(row.method, row.keep) for row in rows.itertuples()]
            decode = rows["decode_ms_per_token"] * (rows["output_tokens"].astype(int) - 1)
            axes.barh(labels, rows["prefill_ms"], color=COLOURS[0], label="prefill")
            axes.barh(labels, decode, left=rows["prefill_ms"], color=COLOURS[1], label="decode")
            axes.set_title(setting_title(rows.iloc[0]), fontsize=8)
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
        panels[-1].set_xlabel("ms")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize=8)
    return figure


def all_figures(cells: pd.DataFrame, efficiency: pd.DataFrame) -> dict[str, Figure]:
    """Every figure that one context's cells (and its model's efficiency rows) allow, by file name."""
    made = {
        "pareto_flops": pareto(cells),
        "pareto_latency": pareto(cells, efficiency, "milliseconds"),
        "accuracy_over_keep": accuracy_over_keep(cells),
        "heat_map": heat_map(cells),
        "layers": layers(cells),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def write_figures(contexts: Iterable[tuple[str, pd.DataFrame]], efficiency: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the figures of all contexts (see :func:`corematching.results.accuracy.contexts`) into a folder."""
    written: list[Path] = []
    for suffix, cells in contexts:
        for name, figure in all_figures(cells, efficiency).items():
            written += save(figure, folder, name + suffix)
    times = breakdown(efficiency)
    return written + (save(times, folder, "time_breakdown") if times is not None else [])


def _banner(figure: Figure, cells: pd.DataFrame) -> None:
    if (cells["data"] == "mini").any():
        figure.suptitle(MINI_BANNER, fontsize=7, color="#a33")
