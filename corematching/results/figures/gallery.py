"""Every figure that a context's cells allow, by file name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from corematching.results.figures.canvas import ShownFigure, save
from corematching.results.figures.heat import heat_map
from corematching.results.figures.layers import layers
from corematching.results.figures.pareto import pareto
from corematching.results.figures.scores import accuracy_over_fraction, accuracy_over_keep, accuracy_over_tokens


def all_figures(cells: pd.DataFrame, efficiency: pd.DataFrame) -> dict[str, ShownFigure]:
    """Every figure that one context's cells (and its model's efficiency rows) allow, by file name."""
    made = {
        "pareto_flops": pareto(cells),
        "pareto_latency": pareto(cells, efficiency, "milliseconds"),
        "accuracy_over_tokens": accuracy_over_tokens(cells),
        "accuracy_over_keep": accuracy_over_keep(cells),
        "accuracy_over_fraction": accuracy_over_fraction(cells),
        "heat_map": heat_map(cells),
        "layers": layers(cells),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def write_figures(contexts: Iterable[tuple[str, pd.DataFrame]], efficiency: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the figures of all contexts (see :func:`corematching.results.accuracy.contexts`) into a folder."""
    return [
        path
        for suffix, cells in contexts
        for name, figure in all_figures(cells, efficiency).items()
        for path in save(figure, folder, name + suffix)
    ]
