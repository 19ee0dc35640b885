"""Metrics as sums of ratios, and tests of paired comparisons, vectorised over cells.

Two runs answer the same questions, so they are compared question by question. The test is McNemar's exact one: could
a coin have decided which of the two gets the questions right that only one gets right? Questions about one image are
not independent, so that the coin is thrown once per cluster ("unit"). Holm's correction accounts for the number of
rows compared with one dense run. Intervals are in :mod:`corematching.results.intervals`, power in
:mod:`corematching.results.power`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special  # scipy.stats would triple the import time for the same two functions

LEVEL = 0.95


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
        The summand's largest value.
    counts : ndarray of shape (units, 1), optional
        Questions of each unit, where the denominator depends on the answers.
    """

    numerator: np.ndarray
    denominator: np.ndarray
    weight: float = 1.0
    counts: np.ndarray | None = None

    @property
    def questions(self) -> np.ndarray:
        """Questions of each unit: (units, 1)."""
        return self.denominator if self.counts is None else self.counts

    def columns(self, chosen: Sequence[int]) -> Ratio:
        """The same of some cells."""
        below = self.denominator[:, chosen] if self.denominator.shape[1] > 1 else self.denominator
        return Ratio(self.numerator[:, chosen], below, self.weight, self.counts)


def estimate(ratios: Sequence[Ratio]) -> np.ndarray:
    """The metric of each cell.

    Returns
    -------
    ndarray of shape (cells,)
        NaN where a summand has no question.
    """
    total: np.ndarray | float = 0.0
    for ratio in ratios:
        with np.errstate(invalid="ignore", divide="ignore"):
            total = total + ratio.weight * ratio.numerator.sum(axis=0) / ratio.denominator.sum(axis=0)
    return np.asarray(total)


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


def sign_flip(changes: np.ndarray) -> np.ndarray:
    """McNemar's test for clusters: exact two-sided test that throws one coin per unit.

    Under the null hypothesis the two runs could be swapped in any unit, so each unit's change is as likely as its
    negative. With one question per unit this is McNemar's exact test.

    Parameters
    ----------
    changes : ndarray of int, shape (units, cells)
        Questions that the second run gets right in a unit, less those that the first does.

    Returns
    -------
    ndarray of float, shape (cells,)
        p-values; 1 where the two never disagree.
    """
    sizes, total = np.abs(changes), changes.sum(axis=0)
    largest = sizes.max(axis=0, initial=0)
    p = mcnemar((changes > 0).sum(axis=0), (changes < 0).sum(axis=0))
    for cell in np.flatnonzero(largest > 1):
        p[cell] = _tail(np.bincount(sizes[:, cell])[1:], abs(int(total[cell])))
    return p


def _tail(counts: np.ndarray, observed: int) -> float:
    """P(|sum| >= observed) of a sum of ``counts[k - 1]`` random signs of size ``k``, for all ``k``."""
    if observed == 0:
        return 1.0
    steps = np.flatnonzero(counts) + 1
    counts = counts[steps - 1]
    largest = int(counts @ steps)
    # The distribution's Fourier transform is a product of cosines; its inverse is exact to rounding.
    angles = 2 * np.pi * np.arange(largest + 1) / (2 * largest + 1)
    transform = (np.cos(np.outer(steps, angles)) ** counts[:, None]).prod(axis=0)
    masses = np.fft.irfft(transform, 2 * largest + 1)
    return float(np.clip(2 * masses[observed : largest + 1].sum(), 2.0 ** (1 - float(counts.sum())), 1.0))


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of one family of p-values; NaN entries stay NaN and do not count."""
    p = np.asarray(p, dtype=float)
    adjusted = np.full(p.shape, np.nan)
    # By hand: statsmodels' multipletests collects garbage on every call, which costs more than all the rest together.
    order = np.argsort(p, kind="stable")[: np.count_nonzero(~np.isnan(p))]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * p[order]))
    return adjusted


def mean_interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float, float]:
    """A mean and Student's interval for it; of paired differences, for the mean difference.

    Returns
    -------
    mean, low, high
        The limits are NaN for fewer than two values.
    """
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return mean, float("nan"), float("nan")
    half = special.stdtrit(count - 1, (1 + level) / 2) * float(np.std(values, ddof=1)) / count**0.5
    return mean, mean - half, mean + half
