"""Rows that are a mean over a method's seeds.

The random control draws tokens; one draw is one number, and says little about chance. Cells whose methods differ only
in ``seed`` are shown as one row: the mean, its spread over seeds, and an interval that covers both the choice of the
questions and the choice of the seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import special

from corematching.results.load import NUMBERS
from corematching.results.selection import CONTEXT
from corematching.results.statistics import LEVEL, Ratio

#: Numbers of a cell that are averaged over seeds; the others are the same for all, or are counts of work done.
COUNTED = ["ended_answers", "capped_answers"]
AVERAGED = [name for name in NUMBERS if name not in ("limit", "seed", "n", "scale", "cap", *COUNTED)]
BY_LAYER = ("visual_tokens_by_layer", "neurons_by_layer")


def merge(cells: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """One row per method and benchmark.

    Returns
    -------
    shown : pandas.DataFrame
        The first finished cell of each row, its numbers averaged (answers: counted) over the row's finished cells.
    members : pandas.Series
        For each cell, the index of the row in ``shown`` that it belongs to.
    """
    keys = [cells[name] for name in (*CONTEXT, "benchmark", "row")]
    members = pd.Series(cells.index, index=cells.index)
    repeated = cells.groupby(keys, sort=False)["id"].transform("size") > 1
    if not repeated.any():
        return cells, members
    shown = cells.copy()
    for _, group in cells[repeated].groupby([key[repeated] for key in keys], sort=False):
        finished = group[group["status"] == "done"]
        first = (finished if len(finished) else group).index[0]
        members[group.index] = first
        if len(finished):
            shown.loc[first, AVERAGED] = finished[AVERAGED].astype(float).mean()
            shown.loc[first, COUNTED] = finished[COUNTED].astype(float).sum(min_count=len(finished))
            for name in BY_LAYER:
                by_layer = _mean_by_layer(finished[name].tolist())
                shown[name] = shown[name].where(shown.index != first, pd.Series([by_layer], [first], dtype=object))
    return shown.loc[shown.index.isin(set(members))], members


def _mean_by_layer(values: Sequence[Sequence[float | None] | None]) -> list[float | None] | None:
    """The mean of each layer, where all cells say something about it."""
    if not all(values):
        return values[0]  # type: ignore[return-value]
    layers = zip(*values, strict=False)  # type: ignore[arg-type]
    return [None if any(count is None for count in layer) else float(np.mean(layer)) for layer in layers]


def averaging(members: pd.Series) -> tuple[pd.Index, np.ndarray]:
    """The rows that cells belong to, in order of appearance, and the matrix (cells, rows) that averages over seeds."""
    places, rows = pd.factorize(members)
    average = np.zeros((len(members), len(rows)))
    average[np.arange(len(members)), places] = 1.0
    return pd.Index(rows), average / average.sum(axis=0)


def average_ratios(ratios: Sequence[Ratio], average: np.ndarray) -> tuple[Ratio, ...]:
    """The metric of rows: sums over questions are averaged over seeds."""
    if average.shape[0] == average.shape[1]:
        return tuple(ratios)  # every row is one cell, in order
    return tuple(
        Ratio(
            ratio.numerator @ average,
            ratio.denominator @ average if ratio.denominator.shape[1] > 1 else ratio.denominator,
            ratio.weight,
            ratio.counts,
        )
        for ratio in ratios
    )


def spread(values: np.ndarray, average: np.ndarray) -> np.ndarray:
    """Standard deviation over the seeds of each row; NaN for a single cell."""
    counts = np.count_nonzero(average, axis=0)
    off = ((values[:, None] - values @ average) ** 2 * (average > 0)).sum(axis=0)
    return np.where(counts > 1, np.sqrt(off / np.maximum(counts - 1, 1)), np.nan)


def widen(
    value: np.ndarray, low: np.ndarray, high: np.ndarray, deviation: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Limits of means over seeds: what another choice of seeds would change is added in squares."""
    several = counts > 1
    quantile = special.stdtrit(np.maximum(counts - 1, 1), (1 + LEVEL) / 2)
    extra = np.where(several, quantile * np.nan_to_num(deviation) / np.sqrt(counts), 0.0)
    return (
        np.where(several, value - np.hypot(value - low, extra), low),
        np.where(several, value + np.hypot(high - value, extra), high),
    )
