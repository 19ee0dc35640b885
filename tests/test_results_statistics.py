"""The statistics against hand-computed cases, scipy, statsmodels and simulation."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests

from corematching.results.estimators import FALLBACK, Questions, choose
from corematching.results.statistics import (
    Ratio,
    bootstrap,
    detectable_difference,
    estimate,
    holm,
    interval,
    mcnemar,
    resample,
)


def mean_of(scores: np.ndarray) -> tuple[Ratio, ...]:
    return (Ratio(scores, np.ones((len(scores), 1)), 100.0),)


def questions(scores, part=None, unit=None, names=("",), positive=None) -> Questions:
    scores = np.asarray(scores, dtype=float)
    scores = scores[:, None] if scores.ndim == 1 else scores
    part = np.zeros(len(scores), dtype=int) if part is None else np.asarray(part)
    unit = np.arange(len(scores)) if unit is None else np.asarray(unit)
    return Questions(scores, part, unit, tuple(names), None if positive is None else np.asarray(positive))


def test_mcnemar_by_hand():
    # 1 against 5: 2 * (C(6,0) + C(6,1)) / 2^6 = 14/64; equal counts and no disagreement give 1.
    assert mcnemar(np.array([1, 5, 3, 0]), np.array([5, 1, 3, 0])) == pytest.approx([14 / 64, 14 / 64, 1, 1])


@pytest.mark.parametrize(("first", "second"), [(0, 9), (3, 14), (20, 31), (7, 7)])
def test_mcnemar_agrees_with_statsmodels_and_scipy(first, second):
    ours = float(mcnemar(np.array(first), np.array(second)))
    assert ours == pytest.approx(statsmodels_mcnemar([[50, first], [second, 50]], exact=True).pvalue)
    assert ours == pytest.approx(stats.binomtest(first, first + second, 0.5).pvalue)


def test_holm_by_hand_with_a_missing_test():
    # Sorted .01 .02 .04 times 3, 2, 1 = .03 .04 .04; the missing one does not count.
    np.testing.assert_allclose(holm(np.array([0.04, np.nan, 0.01, 0.02])), [0.04, np.nan, 0.03, 0.04])


def test_holm_agrees_with_statsmodels():
    p = np.random.default_rng(0).random(40) ** 3
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])
    assert len(holm(np.array([]))) == 0


def test_detectable_difference_is_the_textbook_factor():
    assert detectable_difference(np.array([1.0]))[0] == pytest.approx(1.959964 + 0.841621, abs=1e-5)


def test_resampling_keeps_stratum_sizes_and_seed():
    strata = np.array([0, 1, 0, 1, 1])
    weights = np.concatenate(list(resample(strata, draws=200, seed=3)))
    assert weights.shape == (200, 5)
    assert (weights[:, strata == 0].sum(axis=1) == 2).all()
    assert (weights[:, strata == 1].sum(axis=1) == 3).all()
    np.testing.assert_array_equal(weights, np.concatenate(list(resample(strata, draws=200, seed=3))))
    assert not np.array_equal(weights, np.concatenate(list(resample(strata, draws=200, seed=4))))


def test_resampling_in_blocks_has_the_right_number_of_draws(monkeypatch):
    monkeypatch.setattr("corematching.results.statistics.BLOCK", 70)
    blocks = list(resample(np.zeros(10, dtype=int), draws=25))
    assert [len(block) for block in blocks] == [7, 7, 7, 4]
    assert all((block.sum(axis=1) == 10).all() for block in blocks)


def test_interval_agrees_with_scipy_bootstrap():
    scores = (np.random.default_rng(1).random(300) < 0.7).astype(float)
    low, high = interval(bootstrap(mean_of(scores[:, None]), np.zeros(300, dtype=int), draws=4000))
    theirs = stats.bootstrap((scores,), np.mean, n_resamples=4000, method="percentile", rng=0).confidence_interval
    assert low[0] == pytest.approx(100 * theirs.low, abs=0.8)
    assert high[0] == pytest.approx(100 * theirs.high, abs=0.8)


def test_identical_runs_have_a_difference_of_exactly_zero():
    scores = np.repeat((np.random.default_rng(2).random(80) < 0.6).astype(float)[:, None], 2, axis=1)
    replicates = bootstrap(mean_of(scores), np.zeros(80, dtype=int), draws=200)
    assert (replicates[:, 0] == replicates[:, 1]).all()


def test_clusters_widen_the_interval():
    """Twenty images with ten equal answers each carry the information of twenty questions, not two hundred."""
    answers = np.repeat((np.random.default_rng(3).random(20) < 0.5).astype(float), 10)
    clustered = questions(answers, unit=np.repeat(np.arange(20), 10))
    alone = questions(answers)
    widths = []
    for held in (clustered, alone):
        estimator = choose(held, np.array([100 * answers.mean()]))
        low, high = interval(bootstrap(estimator.ratios, estimator.strata, draws=1000))
        widths.append(float(high[0] - low[0]))
    assert widths[0] / widths[1] == pytest.approx(math.sqrt(10), rel=0.25)


def test_coverage_of_the_paired_interval():
    """Of 400 simulated comparisons, clustered in pairs, 90-98 % of the nominal 95 % intervals hold the truth."""
    rng = np.random.default_rng(4)
    simulations, units, each = 400, 60, 2
    skill_dense, skill_method = 0.8, 0.7
    difficulty = np.repeat(rng.random((units, simulations)), each, axis=0)
    own = rng.random((units * each, simulations))
    draw = np.where(rng.random(own.shape) < 0.5, difficulty, own)
    dense, method = (draw < skill_dense).astype(float), (draw < skill_method).astype(float)
    held = questions(np.concatenate([dense, method], axis=1), unit=np.repeat(np.arange(units), each))
    ratios = (Ratio(held.by_unit(held.scores), np.full((units, 1), float(each)), 1.0),)
    replicates = bootstrap(ratios, np.zeros(units, dtype=int), draws=600)
    low, high = interval(replicates[:, simulations:] - replicates[:, :simulations])
    truth = skill_method - skill_dense
    covered = float(((low <= truth) & (truth <= high)).mean())
    assert 0.90 <= covered <= 0.98, covered


@pytest.mark.parametrize(
    ("expected", "value", "held"),
    [
        ("mean over questions", 50.0, questions([1, 0, 1, 0])),
        # subsets of 1 and 3 questions: (100 + 33.3) / 2
        ("mean over subsets", (100 + 100 / 3) / 2, questions([1, 1, 0, 0], part=[0, 1, 1, 1], names=("a", "b"))),
        # truths y y n n, answers y y n y: TP 2, FP 1, FN 0 -> F1 = 4 / 5, accuracy 75
        ("F1 over subsets", 100 * 4 / 5, questions([1, 1, 1, 0], positive=[True, True, False, False])),
        # accuracy 75 + pairs 50
        ("accuracy + pair accuracy", 125.0, questions([1, 1, 1, 0], unit=[0, 0, 1, 1])),
        ("units all right", 50.0, questions([1, 1, 1, 0], unit=[0, 0, 1, 1])),
        (FALLBACK, 12.3, questions([1, 1, 0, 0])),
    ],
)
def test_the_definition_that_reproduces_the_value_is_taken(expected, value, held):
    estimator = choose(held, np.array([value]))
    assert estimator.name == expected
    if expected != FALLBACK:
        assert estimate(estimator.ratios)[0] == pytest.approx(value)


def test_mme_perception_leaves_cognition_out():
    scores = [1, 1, 0, 0, 1, 0]
    held = questions(scores, [0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2], ("existence", "code_reasoning"))
    estimator = choose(held, np.array([200.0]))
    assert estimator.name == "accuracy + pair accuracy, perception"
    # Units nest in subtasks, so each subtask is resampled to its own size.
    np.testing.assert_array_equal(estimator.strata, [0, 1, 1])


def test_an_image_in_several_subsets_is_one_cluster():
    held = questions([1, 0, 1, 1], part=[0, 0, 1, 1], unit=[0, 1, 0, 1], names=("random", "popular"))
    np.testing.assert_array_equal(held.strata(), [0, 0])


def test_an_estimator_must_fit_every_cell():
    scores = np.array([[1, 1], [0, 1], [1, 0], [0, 0]])
    assert choose(questions(scores), np.array([50.0, 49.0])).name == FALLBACK
