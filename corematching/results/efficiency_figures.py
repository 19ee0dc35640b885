"""Figures of the efficiency rows: speed-up over the visual budget, and decode time against what bytes allow."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from corematching.results.figures import COLOURS, MARKERS, STYLE, new_figure, save
from corematching.results.hardware import SETTING, setting_title

NEURON_METHODS = ("core_neurons", "coreinfer", "wanda_neurons", "random_neurons", "dejavu", "powerinfer")


def speedup_over_keep(efficiency: pd.DataFrame) -> Figure | None:
    """End-to-end speed-up over dense by visual tokens kept, one panel per output length; ``None`` without budgets."""
    counts = efficiency["keep"].map(lambda keep: isinstance(keep, int) and not isinstance(keep, bool))
    shown = efficiency[counts & efficiency["speedup"].notna()]
    if shown.empty:
        return None
    panels = list(shown.groupby(SETTING, sort=True))
    look = _looks(shown)
    figure = new_figure(7.2, 0.4 + 2.2 * len(panels))
    with mpl.rc_context(STYLE):
        for axes, (_, rows) in zip(figure.subplots(len(panels), 1, squeeze=False).ravel(), panels, strict=True):
            for method, points in rows.groupby("method", sort=True):
                line = points.assign(keep=points["keep"].astype(int)).sort_values("keep")
                axes.plot(line["keep"], line["speedup"], label=method, **look[method])
            axes.axhline(1.0, color="#111111", linewidth=0.8)
            axes.set_title(setting_title(rows.iloc[0]), fontsize=8)
            axes.set_ylabel("speed-up over dense")
        axes.set_xlabel("visual tokens kept")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def decode_over_neurons(efficiency: pd.DataFrame) -> Figure | None:
    """Decode time per token by kept share of the FFN, with the line that the bytes to be read allow.

    The line is the dense time scaled by bytes read: what a method would take that reads at dense's own rate.
    """
    longest = efficiency[efficiency["output_tokens"] == efficiency["output_tokens"].max()]
    timed = longest[longest["decode_ms_per_token"].notna() & longest["decode_gb_per_s"].notna()]
    neurons = timed[timed["method_name"].isin(NEURON_METHODS)]
    dense = timed[timed["method_name"] == "dense"]
    panels = [
        (setting, rows, dense[(dense[SETTING] == list(setting)).all(axis=1)])
        for setting, rows in neurons.groupby(SETTING, sort=True)
    ]
    panels = [(setting, rows, base.iloc[-1]) for setting, rows, base in panels if len(base)]
    if not panels:
        return None
    look = _looks(neurons)
    figure = new_figure(7.2, 0.4 + 2.4 * len(panels))
    with mpl.rc_context(STYLE):
        for axes, (_, rows, base) in zip(figure.subplots(len(panels), 1, squeeze=False).ravel(), panels, strict=True):
            for method, points in rows.groupby("method", sort=True):
                line = points.assign(keep=points["keep"].astype(float)).sort_values("keep")
                axes.plot(line["keep"], line["decode_ms_per_token"], label=method, **look[method])
            limit = rows.assign(keep=rows["keep"].astype(float)).sort_values("keep")
            allowed = base["decode_ms_per_token"] * _bytes(limit) / _bytes(base)
            axes.plot(
                [*limit["keep"], 1.0],
                [*allowed, base["decode_ms_per_token"]],
                color="#999999",
                linestyle="--",
                label="allowed by bytes read",
            )
            axes.plot(
                [1.0], [base["decode_ms_per_token"]], label="dense", color="#111111", marker="*", linestyle="none"
            )
            axes.set_title(setting_title(rows.iloc[0]), fontsize=8)
            axes.set_ylabel("decode ms/token")
        axes.set_xlabel("kept share of the FFN neurons")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def write_efficiency_figures(efficiency: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the figures that the rows allow."""
    made = {"speedup_over_keep": speedup_over_keep(efficiency), "decode_over_neurons": decode_over_neurons(efficiency)}
    return [path for name, figure in made.items() if figure is not None for path in save(figure, folder, name)]


def _looks(rows: pd.DataFrame) -> dict[str, dict[str, str]]:
    """A colour and marker per method."""
    methods = enumerate(sorted(set(rows["method"])))
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i // len(COLOURS) % len(MARKERS)]}
        for i, name in methods
    }


def _bytes(rows: pd.DataFrame | pd.Series) -> pd.Series | float:
    """Bytes one decode step reads, up to a common factor."""
    return rows["decode_gb_per_s"] * rows["decode_ms_per_token"]
