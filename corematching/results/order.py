"""The one order of lines: dense, then budget by budget, each as the experiment lists its methods."""

from __future__ import annotations

from typing import Any

CONTROLS = ("random", "uniform", "pooling")


def keep_order(keep: Any) -> tuple[int, float]:
    """Sorting key of a budget: none first, then counts from many to few, then fractions from many to few."""
    if keep is None or keep != keep:
        return (0, 0.0)
    if isinstance(keep, str):
        return (3, 0.0)
    return (1 if float(keep) > 1 or isinstance(keep, int) else 2, -float(keep))


def line_order(method: str, keep: Any) -> tuple[bool, tuple[int, float]]:
    """Sorting key of a line by its method's name and budget; ties keep the experiment's order."""
    return (method != "dense", keep_order(keep))
