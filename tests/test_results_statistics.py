"""The statistics against hand-computed cases, scipy and statsmodels."""

import itertools

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from corematching.results import intervals
from corematching.results.compare import marks
from corematching.results.estimators import FALLBACK, Questions, choose
from corematching.results.power import largest_minority, rejection, smallest_drop
from corematching.results.statistics import Ratio, estimate, holm, mcnemar, sign_flip


def mean_of(scores: np.ndarray, each: int = 1) -> tuple[Ratio, ...]:
    """The mean in percent, from units' sums of ``each`` questions."""
    return (Ratio(scores, np.full((len(scores), 1), float(each)), 100.0),)


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


def test_one_coin_per_unit_by_enumeration():
    changes = np.random.default_rng(0).integers(-3, 4, (9, 20))
    signs = np.array(list(itertools.product((-1, 1), repeat=9)))
    expected = (np.abs(signs @ np.abs(changes)) >= np.abs(changes.sum(axis=0))).mean(axis=0)
    np.testing.assert_allclose(sign_flip(changes), expected)


def test_one_coin_per_unit_is_mcnemar_for_single_questions():
    changes = np.random.default_rng(1).integers(-1, 2, (50, 30))
    np.testing.assert_allclose(sign_flip(changes), mcnemar((changes > 0).sum(axis=0), (changes < 0).sum(axis=0)))


def test_duplicated_answers_add_no_significance():
    """Ten lost questions on five images are worth five."""
    lost = np.zeros((30, 1), dtype=int)
    lost[:5] = -2
    assert sign_flip(lost)[0] == pytest.approx(2 * 0.5**5)


def test_power_at_sixty_questions_and_eighteen_rows():
    assert 100 * smallest_drop(60, 18) == pytest.approx(20.2, abs=0.05)
    assert 100 * smallest_drop(60, 1) == pytest.approx(12.9, abs=0.05)
    assert np.isnan(smallest_drop(6, 18))  # losing all six answers has p = 0.03, times 18


@pytest.mark.parametrize(("n", "rows", "gained"), [(60, 18, 0.0), (300, 6, 0.03), (1000, 40, 0.1), (9000, 20, 0.01)])
def test_the_smallest_drop_is_found_with_the_power_claimed(n, rows, gained):
    drop = smallest_drop(n, rows, gained)
    assert rejection(n, drop + gained, gained, rows) == pytest.approx(0.8, abs=0.02)
    assert rejection(n, 0.8 * drop + gained, gained, rows) < 0.8


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 18, 1e-6])
def test_the_largest_minority_is_the_tests_own_limit(alpha):
    for disagreements in (1, 5, 6, 10, 33, 120, 3001):
        minority = np.arange(disagreements // 2 + 1)
        significant = minority[mcnemar(minority, disagreements - minority) <= alpha]
        expected = significant.max() if len(significant) else -1
        assert largest_minority(np.array([disagreements]), alpha)[0] == expected


def test_marks_tell_a_tie_from_a_loss_that_the_correction_hides():
    p, corrected = np.array([0.2, 0.004, 0.004, 0.0001, 0.004]), np.array([1, 0.07, 0.07, 0.0018, 0.07])
    said = marks(p, corrected, np.array([-5.0, -15.0, 15.0, -30.0, 0.0]), detectable=20.2)
    assert said.tolist() == ["tie", "lower", "higher", "", "tie"]
    assert set(marks(p, corrected, np.ones(5), detectable=float("nan"))) == {""}
    assert set(marks(p, corrected, np.ones(5), detectable=72.0)) == {""}


@pytest.mark.parametrize("right", [0, 1, 30, 59, 60])
def test_without_clusters_the_interval_is_clopper_and_pearsons(right):
    scores = (np.arange(60) < right).astype(float)[:, None]
    low, high = intervals.single(mean_of(scores))
    assert (low[0] / 100, high[0] / 100) == pytest.approx(proportion_confint(right, 60, method="beta"))


def test_at_the_extremes_one_limit_is_the_extreme():
    low, high = intervals.single(mean_of(np.array([[1.0, 0.0]] * 60)))
    assert high[0] == 100
    assert low[1] == 0
    assert low[0] == pytest.approx(100 * 0.025 ** (1 / 60)) == pytest.approx(100 - high[1])


def test_units_whose_questions_stand_or_fall_together_count_once():
    """Thirty images with two equal answers each carry the information of thirty questions; unequal ones of more."""
    answers = (np.arange(30) < 24).astype(float)[:, None]
    mixed = np.repeat([2.0, 1.0], [18, 12])[:, None]
    low, high = intervals.single(mean_of(2 * answers, each=2))
    expected = proportion_confint(24, 30, method="beta")
    assert (low[0] / 100, high[0] / 100) == pytest.approx(expected, abs=0.02)
    tighter_low, tighter_high = intervals.single(mean_of(mixed, each=2))
    assert tighter_high[0] - tighter_low[0] < 0.8 * (high[0] - low[0])


def test_an_interval_of_a_difference_excludes_zero_where_many_are_lost_and_is_mirrored():
    dense = np.repeat([1.0, 0.0], [50, 10])
    worse = dense.copy()
    worse[:12] = 0
    low, high = intervals.paired(mean_of(np.column_stack([dense, worse, dense])))
    assert -35 < low[1] < -20 < high[1] < -5
    assert low[2] < 0 < high[2]  # no change seen: the interval has a width, and is the same on both sides
    assert low[2] == pytest.approx(-high[2])
    back_low, back_high = intervals.paired(mean_of(np.column_stack([worse, dense])))
    assert (back_low[1], back_high[1]) == pytest.approx((-high[1], -low[1]))


def test_the_interval_of_f1_differences_lies_around_the_difference():
    rng = np.random.default_rng(5)
    positive = np.arange(200) % 2 == 0
    answers = (rng.random((200, 2)) < [0.9, 0.7]).astype(float)
    held = questions(answers, positive=positive)
    f1 = [
        100 * 2 * h / (2 * h + e)
        for h, e in zip((answers * positive[:, None]).sum(0), (1 - answers).sum(0), strict=True)
    ]
    estimator = choose(held, np.array(f1))
    assert estimator.name == "F1 over subsets"
    low, high = intervals.paired(estimator.ratios)
    assert low[1] < f1[1] - f1[0] < high[1]
    assert high[1] - low[1] < 30


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


def test_an_estimator_must_fit_every_cell():
    scores = np.array([[1, 1], [0, 1], [1, 0], [0, 0]])
    assert choose(questions(scores), np.array([50.0, 49.0])).name == FALLBACK
