"""Statistics of paired comparisons, vectorised over cells.

Two runs answer the same questions, so they are compared question by question: a paired bootstrap gives the interval
of the difference, McNemar's exact test asks whether the questions that only one of them gets right could be a coin's
doing, and Holm's correction accounts for the number of methods compared with one dense run. Questions about one image
are not independent: the bootstrap draws whole clusters ("units").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special  # scipy.stats would triple the import time for the same two functions

DRAWS = 2000
LEVEL = 0.95
#: Elements of one block of resampling weights (float64): bounds the memory on benchmarks with 200,000 questions.
BLOCK = 4_000_000


@dataclass(frozen=True)
class Ratio:
    """One summand of a metric: ``weight * sum(numerator) / sum(denominator)`` over units.

    Every metric quoted by the papers is a sum of such ratios (a mean; a mean over subsets; F1; MME's accuracy plus
    pair accuracy).

    Attributes
    ----------
    numerator : ndarray of shape (units, cells)
        Sums over each unit's questions.
    denominator : ndarray of shape (units, cells) or (units, 1)
        Likewise; a column shared by all cells where it does not depend on the answers.
    weight : float
    """

    numerator: np.ndarray
    denominator: np.ndarray
    weight: float = 1.0


def estimate(ratios: Sequence[Ratio], weights: np.ndarray | None = None) -> np.ndarray:
    """The metric of each cell.

    Parameters
    ----------
    ratios
        The metric's summands.
    weights : ndarray of shape (draws, units), optional
        How often each unit was drawn; omitted: once.

    Returns
    -------
    ndarray of shape (draws, cells), or (cells,) without weights
        NaN where a summand has no question.
    """
    total: np.ndarray | float = 0.0
    for ratio in ratios:
        if weights is None:
            above, below = ratio.numerator.sum(axis=0), ratio.denominator.sum(axis=0)
        else:
            above, below = weights @ ratio.numerator, weights @ ratio.denominator
        with np.errstate(invalid="ignore", divide="ignore"):
            total = total + ratio.weight * above / below
    return np.asarray(total)


def resample(strata: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Iterator[np.ndarray]:
    """Blocks of bootstrap weights: how often each unit is drawn, within its stratum.

    Parameters
    ----------
    strata : ndarray of int, shape (units,)
        Each stratum is resampled to its own size; all zeros is the ordinary bootstrap.
    draws
        Resamples in all.
    seed
        Of the random generator: the same seed gives the same intervals.

    Yields
    ------
    ndarray of shape (block, units)
    """
    rng = np.random.default_rng(seed)
    units = len(strata)
    members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    block = max(1, BLOCK // max(units, 1))
    for start in range(0, draws, block):
        rows = min(block, draws - start)
        weights = np.zeros((rows, units))
        for columns in members:
            size = len(columns)
            picked = rng.integers(0, size, (rows, size)) + size * np.arange(rows)[:, None]
            weights[:, columns] = np.bincount(picked.ravel(), minlength=rows * size).reshape(rows, size)
        yield weights


def bootstrap(ratios: Sequence[Ratio], strata: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Bootstrap replicates of a metric; all cells share the resamples, so that differences of columns are paired.

    Returns
    -------
    ndarray of shape (draws, cells)
    """
    return np.concatenate([estimate(ratios, weights) for weights in resample(strata, draws, seed)])


def interval(replicates: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval over the first axis; replicates that are NaN (an empty subset was drawn) are left out."""
    tail = (1 - level) / 2
    quantile = np.nanquantile if np.isnan(replicates).any() else np.quantile
    low, high = quantile(replicates, [tail, 1 - tail], axis=0)
    return low, high


def mcnemar(only_first: np.ndarray, only_second: np.ndarray) -> np.ndarray:
    """Exact two-sided McNemar test from the discordant counts.

    Parameters
    ----------
    only_first, only_second : ndarray of int
        Questions that only the first (second) of two runs gets right.

    Returns
    -------
    ndarray of float
        p-values; 1 where the two never disagree.
    """
    only_first, only_second = np.asarray(only_first), np.asarray(only_second)
    disagreements = only_first + only_second
    return np.minimum(1.0, 2 * special.bdtr(np.minimum(only_first, only_second), disagreements, 0.5))


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of one family of p-values; NaN entries stay NaN and do not count."""
    p = np.asarray(p, dtype=float)
    adjusted = np.full(p.shape, np.nan)
    # By hand: statsmodels' multipletests collects garbage on every call, which costs more than all the rest together.
    order = np.argsort(p, kind="stable")[: np.count_nonzero(~np.isnan(p))]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * p[order]))
    return adjusted


def detectable_difference(standard_error: np.ndarray, alpha: float = 1 - LEVEL, power: float = 0.8) -> np.ndarray:
    """The smallest true difference that a two-sided test of level ``alpha`` finds with probability ``power``."""
    return (special.ndtri(1 - alpha / 2) + special.ndtri(power)) * np.asarray(standard_error)
