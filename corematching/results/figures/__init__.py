"""Figures of the results, as vector PDF and PNG. Same input, same bytes: no dates, no random ids in the files.

Each function returns a matplotlib figure, or ``None`` where the cells hold nothing to draw; :func:`save` writes it.
Figures of efficiency rows are in :mod:`corematching.results.efficiency_figures`, those that show what a model does
inside in :mod:`corematching.inspection.evidence_figures`.
"""

from corematching.results.figures.canvas import png, save
from corematching.results.figures.gallery import all_figures, write_figures
from corematching.results.figures.heat import heat_map
from corematching.results.figures.layers import layers
from corematching.results.figures.looks import styles
from corematching.results.figures.pareto import frontier, pareto, pareto_points
from corematching.results.figures.scores import accuracy_over_fraction, accuracy_over_keep, accuracy_over_tokens

__all__ = [
    "accuracy_over_fraction",
    "accuracy_over_keep",
    "accuracy_over_tokens",
    "all_figures",
    "frontier",
    "heat_map",
    "layers",
    "pareto",
    "pareto_points",
    "png",
    "save",
    "styles",
    "write_figures",
]
