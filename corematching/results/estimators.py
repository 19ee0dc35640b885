"""The papers' metrics rebuilt from per-question scores, as sums of ratios that can be resampled.

An interval must belong to the number it stands beside. A benchmark's metric may be a mean over questions, a mean over
subsets, an F1 score or MME's accuracy plus pair accuracy; :func:`choose` takes the first definition that reproduces
the stored value of *every* cell and falls back to the mean per-question score, saying so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from corematching.benchmarks.spec import MME_COGNITION
from corematching.results.statistics import Ratio, estimate

FALLBACK = "mean question score"
UNITS = "units all right"


@dataclass(frozen=True)
class Questions:
    """Scores of several cells on the same questions.

    Attributes
    ----------
    scores : ndarray of shape (questions, cells), in [0, 1]
    part, unit : ndarray of int, shape (questions,)
        Subset and cluster of each question, as indices.
    part_names : tuple of str
    positive : ndarray of bool, shape (questions,), or None
        Whether the target is "yes", if all targets are yes or no.
    """

    scores: np.ndarray
    part: np.ndarray
    unit: np.ndarray
    part_names: tuple[str, ...]
    positive: np.ndarray | None

    @property
    def units(self) -> int:
        return int(self.unit.max()) + 1 if len(self.unit) else 0

    def by_unit(self, values: np.ndarray) -> np.ndarray:
        """Sum rows of ``values`` (questions, cells) over each unit: (units, cells)."""
        return sum_by(self.unit, values)


def sum_by(unit: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sum rows of ``values`` over each unit (indices from 0, none left out)."""
    if np.array_equal(unit, np.arange(len(unit))):
        return values
    order = np.argsort(unit, kind="stable")
    starts = np.flatnonzero(np.diff(unit[order], prepend=-1))
    return np.add.reduceat(values[order], starts, axis=0)


@dataclass(frozen=True)
class Estimator:
    """A metric as ratios of sums over units.

    Attributes
    ----------
    name : str
    ratios : tuple of Ratio
    right : ndarray of bool, shape (questions, cells) or (units, cells)
        What the test counts: questions answered right (a score of at least 0.5) or, where the metric asks for all of a
        unit's answers to be right, units.
    unit : ndarray of int
        The unit of each row of ``right``.
    """

    name: str
    ratios: tuple[Ratio, ...]
    right: np.ndarray
    unit: np.ndarray


def choose(questions: Questions, values: np.ndarray) -> Estimator:
    """The definition that reproduces ``values`` (cells,), the metric stored with each cell."""
    for name, build in DEFINITIONS.items():
        ratios = build(questions)
        if ratios and np.allclose(estimate(ratios), values, rtol=1e-6, atol=1e-6):
            if name == UNITS:
                return Estimator(name, ratios, _unit_right(questions).astype(bool), np.arange(questions.units))
            return Estimator(name, ratios, questions.scores >= 0.5, questions.unit)
    return Estimator(FALLBACK, _mean(questions), questions.scores >= 0.5, questions.unit)


def _masked(questions: Questions, rows: np.ndarray, weight: float) -> Ratio:
    mask = rows[:, None].astype(float)
    return Ratio(questions.by_unit(questions.scores * mask), questions.by_unit(mask), weight)


def _mean(questions: Questions) -> tuple[Ratio, ...]:
    return (_masked(questions, np.ones(len(questions.part), dtype=bool), 100.0),)


def _part_mean(questions: Questions) -> tuple[Ratio, ...]:
    parts = len(questions.part_names)
    return tuple(_masked(questions, questions.part == part, 100.0 / parts) for part in range(parts))


def _all_right(questions: Questions) -> tuple[Ratio, ...]:
    """Share of units whose questions are all right (MMBench's circular evaluation)."""
    right = _unit_right(questions)
    return (Ratio(right, np.ones((len(right), 1)), 100.0),)


def _f1(questions: Questions) -> tuple[Ratio, ...]:
    """F1 of "yes", averaged over subsets; an answer that is wrong counts as the other one."""
    if questions.positive is None:
        return ()
    positive = questions.positive[:, None]
    said_yes = np.where(positive, questions.scores >= 0.5, questions.scores < 0.5)
    parts = len(questions.part_names)
    ratios = []
    for part in range(parts):
        rows = (questions.part == part)[:, None]
        hits = questions.by_unit(2.0 * (said_yes & positive & rows))
        below = questions.by_unit((said_yes & rows).astype(float) + (positive & rows))
        ratios.append(Ratio(hits, below, 100.0 / parts, questions.by_unit(rows.astype(float))))
    return tuple(ratios)


def _mme(questions: Questions, skip: tuple[str, ...] = ()) -> tuple[Ratio, ...]:
    """Sum over subtasks of accuracy plus pair accuracy, each times 100; a pair is a unit."""
    right = _unit_right(questions)
    ratios: list[Ratio] = []
    for part, name in enumerate(questions.part_names):
        if name in skip:
            continue
        rows = questions.part == part
        held = (questions.by_unit(rows[:, None].astype(float)) > 0).astype(float)
        ratios += [_masked(questions, rows, 100.0), Ratio(right * held, held, 100.0)]
    return tuple(ratios)


def _unit_right(questions: Questions) -> np.ndarray:
    wrong = questions.by_unit((questions.scores < 0.5).astype(float))
    return (wrong == 0).astype(float)


#: In the order tried. The first two are also the plain reading of a score column.
DEFINITIONS: dict[str, Callable[[Questions], tuple[Ratio, ...]]] = {
    "mean over questions": _mean,
    "mean over subsets": _part_mean,
    "F1 over subsets": _f1,
    "accuracy + pair accuracy": _mme,
    "accuracy + pair accuracy, perception": lambda questions: _mme(questions, MME_COGNITION),
    UNITS: _all_right,
}
