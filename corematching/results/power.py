"""The smallest drop from dense that a table's own rule finds: exact McNemar, corrected over the table's rows."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import special

from corematching.results.statistics import LEVEL

POWER = 0.8


def rejection(n: int, lost: float, gained: float = 0.0, rows: int = 1, alpha: float = 1 - LEVEL) -> float:
    """Probability that the exact McNemar test finds a method to be worse.

    Parameters
    ----------
    n
        Questions; where questions share images, the number that they are worth.
    lost, gained
        Probability that the method alone gets a question wrong (right).
    rows
        Comparisons that the correction is for. A drop must pass Holm's first step, ``alpha / rows``, unless other rows
        drop further.
    alpha
        Level of the corrected test, two-sided.

    Returns
    -------
    float
        Chance of a significant loss (not: of any significant difference).
    """
    different = min(lost + gained, 1.0)
    if different <= 0:
        return 0.0
    reach = 7 * np.sqrt(n * different * (1 - different)) + 7
    disagreements = np.arange(max(1, int(n * different - reach)), min(n, int(n * different + reach)) + 1)
    allowed = largest_minority(disagreements, alpha / rows)
    found = np.where(allowed >= 0, special.bdtr(np.maximum(allowed, 0), disagreements, gained / different), 0.0)
    chance = np.diff(special.bdtr(np.append(disagreements[0] - 1, disagreements), n, different))
    return float(chance @ found)


def largest_minority(disagreements: np.ndarray, alpha: float) -> np.ndarray:
    """The largest count of answers on the weaker side with a p-value of at most ``alpha``; -1 where there is none."""
    root = np.sqrt(disagreements)
    guess = np.floor(disagreements / 2 + special.ndtri(alpha / 2) * root / 2).astype(int)
    best = np.full(len(disagreements), -1)
    for trial in (guess + step for step in range(-4, 4)):  # the normal guess is no further off
        fits = (trial >= 0) & (2 * special.bdtr(np.maximum(trial, 0), disagreements, 0.5) <= alpha)
        best = np.where(fits, trial, best)
    return best


@lru_cache(maxsize=4096)
def smallest_drop(n: int, rows: int = 1, gained: float = 0.0, power: float = POWER) -> float:
    """The smallest true drop (as a share of the questions) that is found with a given probability.

    Parameters
    ----------
    n, rows, gained
        See :func:`rejection`.
    power
        The probability.

    Returns
    -------
    float
        NaN if not even the loss of every answer is found.
    """
    if gained <= 0:  # only the count of lost answers is random
        needed = np.arange(1, n + 1)
        needed = needed[2.0 ** (1.0 - needed) <= (1 - LEVEL) / rows]
        return float(special.betaincinv(needed[0], n - needed[0] + 1, power)) if len(needed) else float("nan")
    if rejection(n, 1.0 - gained, gained, rows) < power:
        return float("nan")
    low, high = gained, 1.0 - gained
    while high - low > 1e-5:
        middle = (low + high) / 2
        found = rejection(n, middle, gained, rows) >= power
        low, high = (low, middle) if found else (middle, high)
    return high - gained
