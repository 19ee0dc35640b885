"""Simulations: intervals hold their level, and the table's rule finds what the power note says (slow)."""

import numpy as np
import pytest

from corematching.results import intervals
from corematching.results.estimators import Questions, choose
from corematching.results.power import smallest_drop
from corematching.results.statistics import Ratio, holm, mcnemar, sign_flip

pytestmark = pytest.mark.slow
NOMINAL = 0.93
SKILLS = (0.5, 0.9, 0.95, 0.983, 0.999)
#: Questions, questions per unit, and how strongly a unit's questions stand or fall together.
DESIGNS = [
    *((n, 1, 0.0) for n in (30, 60, 300)),
    *((n, 2, together) for n in (30, 60, 300) for together in (0.0, 0.3, 1.0)),
    *((300, 6, together) for together in (0.1, 0.6)),
]


def draws(rng, n, each, together, simulations):
    """Uniform draws of shape (units, each, simulations); with probability ``together`` a question has its unit's."""
    shape = (n // each, each, simulations)
    shared = rng.random((n // each, 1, simulations))
    return np.where(rng.random(shape) < np.sqrt(together), shared, rng.random(shape))


def mean_of(right):
    """The mean in percent of right answers of shape (units, each, cells)."""
    return (Ratio(right.sum(axis=1).astype(float), np.full((len(right), 1), float(right.shape[1])), 100.0),)


@pytest.mark.parametrize(("n", "each", "together"), DESIGNS)
def test_single_scores(n, each, together):
    rng = np.random.default_rng(n + each)
    for skill in SKILLS:
        low, high = intervals.single(mean_of(draws(rng, n, each, together, 4000) < skill))
        covered = float(((low <= 100 * skill) & (100 * skill <= high)).mean())
        assert covered >= NOMINAL, (skill, covered)


@pytest.mark.parametrize(("n", "each", "together"), DESIGNS)
def test_paired_differences(n, each, together):
    """A method shares most of its draws with dense; in truth it is as good, or worse by a little or by a lot."""
    rng = np.random.default_rng(n + each)
    simulations = 500
    for skill in SKILLS:
        for drop in (0.0, 0.02, 0.15):
            dense = draws(rng, n, each, together, simulations)
            other = np.where(rng.random(dense.shape) < 0.7, dense, draws(rng, n, each, together, simulations))
            right = np.stack([dense < skill, other < skill - drop])
            bounds = [intervals.paired(mean_of(np.moveaxis(right[..., one], 0, -1))) for one in range(simulations)]
            covered = np.mean([low[1] - 1e-9 <= -100 * drop <= high[1] + 1e-9 for low, high in bounds])
            assert covered >= NOMINAL, (skill, drop, covered)


@pytest.mark.parametrize("skill", [0.6, 0.9, 0.983])
def test_f1_and_its_differences(skill):
    """POPE's kind: yes or no, six questions per image, half of them yes."""
    rng = np.random.default_rng(8)
    simulations, n, each = 600, 120, 6
    positive, unit = np.arange(n) % 2 == 0, np.repeat(np.arange(n // each), each)
    truth = [100 * 2 * p / (2 * p + 2 * (1 - p)) for p in (skill, skill - 0.1)]
    covered = np.zeros(2)
    for _ in range(simulations):
        drawn = draws(rng, n, each, 0.2, 1).reshape(n)
        scores = np.column_stack([drawn < skill, drawn < skill - 0.1]).astype(float)
        held = Questions(scores, np.zeros(n, dtype=int), unit, ("",), positive)
        hits, errors = (scores * positive[:, None]).sum(axis=0), (1 - scores).sum(axis=0)
        ratios = choose(held, 100 * 2 * hits / (2 * hits + errors)).ratios
        for place, (low, high), value in (
            (0, intervals.single(ratios), truth[1]),
            (1, intervals.paired(ratios), truth[1] - truth[0]),
        ):
            covered[place] += low[1] <= value <= high[1]
    assert (covered / simulations >= NOMINAL).all(), covered / simulations


def test_mme_and_its_differences():
    """Accuracy plus pair accuracy over four subtasks of unlike difficulty."""
    rng = np.random.default_rng(9)
    simulations, pairs, subtasks = 600, 20, 4
    skills = np.repeat([0.98, 0.9, 0.7, 0.5], 2 * pairs)
    part, unit = np.repeat(np.arange(subtasks), 2 * pairs), np.repeat(np.arange(subtasks * pairs), 2)
    names = ("existence", "count", "position", "color")
    covered = np.zeros(2)
    totals = [sum(100 * (p + p * p) for p in skills[:: 2 * pairs] - drop) for drop in (0.0, 0.08)]
    for _ in range(simulations):
        dense = rng.random(len(skills))
        other = np.where(rng.random(len(skills)) < 0.7, dense, rng.random(len(skills)))
        scores = np.column_stack([dense < skills, other < skills - 0.08]).astype(float)
        right = scores.reshape(subtasks, pairs, 2, 2)
        values = 100 * (right.mean(axis=(1, 2)) + right.all(axis=2).mean(axis=1)).sum(axis=0)
        estimator = choose(Questions(scores, part, unit, names, None), values)
        assert estimator.name == "accuracy + pair accuracy"
        for place, (low, high), value in (
            (0, intervals.single(estimator.ratios), totals[1]),
            (1, intervals.paired(estimator.ratios), totals[1] - totals[0]),
        ):
            covered[place] += low[1] <= value <= high[1]
    assert (covered / simulations >= NOMINAL).all(), covered / simulations


@pytest.mark.parametrize(("n", "rows", "gained"), [(60, 18, 0.0), (60, 18, 0.05), (150, 5, 0.02), (400, 30, 0.08)])
def test_power_of_the_tables_rule(n, rows, gained):
    """One row drops by what the note says, the others are as good as dense: Holm finds it in 80 % of tables."""
    rng = np.random.default_rng(n)
    lost = smallest_drop(n, rows, gained) + gained
    found = 0
    for _ in range(2000):
        u = rng.random((n, rows))
        changes = np.where(u < gained, 1, np.where(u > 1 - gained, -1, 0))
        changes[:, 0] = np.where(u[:, 0] < gained, 1, np.where(u[:, 0] > 1 - lost, -1, 0))
        found += holm(mcnemar((changes > 0).sum(axis=0), (changes < 0).sum(axis=0)))[0] < 0.05
    assert found / 2000 == pytest.approx(0.8, abs=0.04)


def test_clustered_questions_do_not_make_chance_significant():
    """Dense and a method of equal skill on images whose six questions stand or fall together."""
    rng = np.random.default_rng(10)
    right = draws(rng, 300, 6, 0.8, 4000)
    changes = (right[..., :2000] < 0.8).sum(axis=1) - (right[..., 2000:] < 0.8).sum(axis=1)
    assert (sign_flip(changes) < 0.05).mean() <= 0.06
