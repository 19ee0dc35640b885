"""Intervals that hold their level at extreme proportions, in clusters, and for differences of paired runs.

A percentile bootstrap of 59 right answers out of 60 holds the truth in 63 % of cases where it claims 95 %, and gives
"100 ± 0" where everything is right. Here a metric is taken as a share of its largest value, and its interval is
Clopper and Pearson's (1934) for as many questions as the answers are worth: the number of questions divided by the
design effect of their clusters, estimated from the data (Korn and Graubard 1998). Where too few answers are wrong to
estimate it, the design effect leans to the one that can do no harm: that questions of one unit stand or fall together.

Differences are of gains and losses: both are shares, and their limits are combined by the method of variance estimates
recovery (Zou and Donner 2008). Everything is closed-form and vectorised over cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special  # scipy.stats would triple the import time for the same functions

from corematching.results.statistics import LEVEL, Ratio

#: How many wrong (or right) answers the assumption counts for that a unit's questions stand or fall together.
PRIOR = 1.0


@dataclass(frozen=True)
class Size:
    """How much a metric's questions are worth, if independent, and if each unit's stand or fall together.

    Attributes
    ----------
    questions : ndarray of shape (cells,) or (1,)
        Kish's effective number of questions: their number if all weigh the same.
    units : float
        The same of units.
    clustering : float
        Questions per unit, likewise: 1 where there are no clusters.
    weights : ndarray of shape (units, 1)
        Each unit's weight; they sum to 1.
    count : int
        Units that weigh anything.
    """

    questions: np.ndarray
    clustering: float
    weights: np.ndarray
    count: int


def size(ratios: Sequence[Ratio]) -> Size:
    """The :class:`Size` of a metric."""
    largest = sum(ratio.weight for ratio in ratios)
    alone = together = 0.0
    questions, weights = np.zeros(1), np.zeros((len(ratios[0].numerator), 1))
    for ratio in ratios:
        share, counts = ratio.weight / largest, ratio.questions
        total = counts.sum()
        questions = questions + share**2 / np.maximum(ratio.denominator.sum(axis=0), 1.0)
        alone += share**2 / total
        weights = weights + share * counts / total
    together = float((weights**2).sum())
    return Size(1 / questions, max(1.0, together / alone), weights, int(np.count_nonzero(weights)))


def single(ratios: Sequence[Ratio], level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Interval of a metric, per cell, on its own scale.

    Parameters
    ----------
    ratios
        The metric.
    level
        Coverage. At an extreme (everything right, everything wrong) one limit is the extreme itself and the other
        keeps its tail of ``(1 - level) / 2``, so that coverage never falls below ``level``.

    Returns
    -------
    low, high : ndarray of shape (cells,)
        NaN where a summand has no question.
    """
    largest = sum(ratio.weight for ratio in ratios)
    share: np.ndarray | float = 0.0
    residual: np.ndarray | float = 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        for ratio in ratios:
            below = ratio.denominator.sum(axis=0)
            own = ratio.numerator.sum(axis=0) / below
            share = share + ratio.weight / largest * own
            residual = residual + ratio.weight / largest * (ratio.numerator - own * ratio.denominator) / below
    low, high = limits(np.asarray(share), (np.asarray(residual) ** 2).sum(axis=0), size(ratios), level)
    return largest * low, largest * high


def paired(ratios: Sequence[Ratio], reference: int = 0, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Interval of every cell's difference from one cell that answered the same questions.

    Parameters
    ----------
    ratios
        The metric.
    reference
        Column of the cell that the others are compared with.
    level
        Coverage.

    Returns
    -------
    low, high : ndarray of shape (cells,)
        In points of the metric.
    """
    largest = sum(ratio.weight for ratio in ratios)
    change: np.ndarray | float = 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        for ratio in ratios:
            above, below = ratio.numerator.sum(axis=0), ratio.denominator.sum(axis=0)
            own = above / below
            middle, base = (own + own[reference]) / 2, (below + below[reference if len(below) > 1 else 0]) / 2
            column = slice(reference, reference + 1)
            lower = ratio.denominator[:, column] if ratio.denominator.shape[1] > 1 else ratio.denominator
            moved = ratio.numerator - ratio.numerator[:, column] - middle * (ratio.denominator - lower)
            # Sums over units to the difference of the two ratios exactly, also where the denominators differ (F1).
            change = change + ratio.weight / largest * moved / base
    change = np.asarray(change)
    worth = size(ratios)
    spread = float((worth.weights**2).sum())
    sides = []
    for part in (np.maximum(change, 0.0), np.maximum(-change, 0.0)):
        share = part.sum(axis=0)
        variance = ((part - share * worth.weights) ** 2).sum(axis=0)
        sides.append((share, variance, *limits(share, variance, worth, level)))
    (gain, gain_variance, gain_low, gain_high), (loss, loss_variance, loss_low, loss_high) = sides
    with np.errstate(invalid="ignore", divide="ignore"):
        # No unit both gains and loses: the two are negatively correlated.
        correlation = np.maximum(-gain * loss * spread / np.sqrt(gain_variance * loss_variance), -1.0)
    correlation = np.where(np.isfinite(correlation), correlation, 0.0)
    difference = gain - loss
    low = difference - _combine(gain - gain_low, loss_high - loss, correlation)
    high = difference + _combine(gain_high - gain, loss - loss_low, correlation)
    return largest * low, largest * high


def _combine(one: np.ndarray, other: np.ndarray, correlation: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(one**2 + other**2 - 2 * correlation * one * other, 0.0))


def limits(share: np.ndarray, variance: np.ndarray, worth: Size, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Clopper and Pearson's limits of shares, for the effective number of questions.

    Parameters
    ----------
    share : ndarray of shape (cells,), in [0, 1]
    variance : ndarray of shape (cells,)
        Of the share, between units: the sum of squared residuals.
    worth
        What the questions are worth.
    level
        Coverage.

    Returns
    -------
    low, high : ndarray of shape (cells,)
    """
    tail = (1 - level) / 2
    share = np.clip(share, 0.0, 1.0)
    rare = np.minimum(share, 1 - share)
    seen = rare * worth.questions
    with np.errstate(invalid="ignore", divide="ignore"):
        effect = np.where(seen > 1e-9, variance * worth.questions / (share * (1 - share)), worth.clustering)
    effect = np.maximum(1.0, (seen * effect + PRIOR * worth.clustering) / (seen + PRIOR))
    n = worth.questions / effect
    if worth.clustering > 1.0 and worth.count > 1:
        # The variance between a few units is itself uncertain.
        n = n * (special.ndtri(1 - tail) / special.stdtrit(worth.count - 1, 1 - tail)) ** 2
    right = share * n
    wrong = n - right
    none, every = right <= 1e-9, wrong <= 1e-9
    low = np.where(none, 0.0, special.betaincinv(np.maximum(right, 1e-9), wrong + 1, tail))
    high = np.where(every, 1.0, special.betaincinv(right + 1, np.maximum(wrong, 1e-9), 1 - tail))
    return low, high
