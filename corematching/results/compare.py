"""Compare every accuracy cell with the dense run, and with the random control, on the same questions."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from corematching.results import intervals, power, seeds, statistics
from corematching.results.completeness import partial
from corematching.results.estimators import Estimator, Questions, choose, sum_by
from corematching.results.load import Problem, Results, StoreWarning
from corematching.results.selection import QUESTIONS
from corematching.results.spread import spread

#: Numbers added to each cell, NaN where nothing can be said.
COLUMNS = (
    *("low", "high", "difference", "difference_low", "difference_high", "only_method", "only_dense", "p", "p_holm"),
    *("rows", "detectable", "detectable_with_gains", "dense_right", "questions", "units", "seeds", "seed_spread"),
    *("control_difference", "control_low", "control_high", "control_p", "control_p_holm"),
)
#: Words added likewise, empty where nothing can be said.
WORDS = ("mark", "control", "partial", "estimator", "remark")
#: A rule that would miss a drop of so many points marks nothing.
BLIND = 50.0
#: How far visual tokens per layer may lie from the random control's.
SAME_TOKENS = 0.03


def compare(results: Results, cells: pd.DataFrame) -> pd.DataFrame:
    """Intervals and tests for selected accuracy cells.

    Parameters
    ----------
    results
        The stores, for the sample rows.
    cells
        What :func:`corematching.results.selection.select` returned.

    Returns
    -------
    pandas.DataFrame
        One row per method, parameters and benchmark (a method's seeds are averaged, see
        :mod:`corematching.results.seeds`), with :data:`COLUMNS` and :data:`WORDS` added. Scores and differences are in
        points of the benchmark's own scale, ``detectable`` in points of questions answered right. ``p_holm`` corrects
        over all ``rows`` that share one dense cell. ``mark`` is what :func:`marks` says.
    """
    shown, members = seeds.merge(cells)
    out = shown.assign(**dict.fromkeys(COLUMNS, np.nan), **dict.fromkeys(WORDS, ""))
    done = cells[(cells["status"] == "done") & cells["value"].notna()]
    groups = [group for _, group in done.groupby(QUESTIONS, dropna=False, sort=False)]
    tasks = [(group, members.loc[group.index]) for group in groups]
    for frames, problems in spread(_of_group, tasks, len(done)):
        for problem in problems:
            results.report(problem.folder, problem.reason)
        for frame in frames:
            out.loc[frame.index, frame.columns] = frame
    return out


def _of_group(task: tuple[pd.DataFrame, pd.Series]) -> tuple[list[pd.DataFrame], list[Problem]]:
    """Statistics of one group and its members, with what could not be read."""
    found = Results(pd.DataFrame())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)  # whoever asks warns
        return _group(found, *task), found.problems


def _group(results: Results, group: pd.DataFrame, members: pd.Series) -> list[pd.DataFrame]:
    """Statistics of the cells that answered one benchmark's questions in one context."""
    dense = group.index[group["method_name"] == "dense"]
    order = [*dense, *group.index.difference(dense, sort=False)]
    aligned = align(results, group.loc[order])
    remarks = {members[index]: text for index, text in aligned.remarks.items()}
    frames = [pd.DataFrame({"remark": remarks}, dtype=object)] if remarks else []
    if aligned.questions is None or not len(aligned.questions.scores):
        return frames
    cells = group.loc[aligned.kept]
    estimator = choose(aligned.questions, cells["value"].to_numpy())
    rows, average = seeds.averaging(members.loc[cells.index])
    pairs = Pairs(estimator, average)
    first = cells.iloc[0]
    low, high = pairs.single()
    columns: dict[str, object] = {
        "low": low,
        "high": high,
        "questions": float(len(aligned.questions.scores)),
        "units": float(aligned.questions.units),
        "seeds": pairs.counts.astype(float),
        "seed_spread": pairs.spread,
        "estimator": estimator.name,
        "partial": partial(first["benchmark"], first["metric"], aligned.questions.part_names),
    }
    if len(dense) and cells.index[0] == dense[0]:
        columns |= _against_dense(pairs)
    tokens = cells["visual_tokens_per_layer"].to_numpy() @ average
    columns |= _against_control(pairs, group.loc[rows], tokens)
    return [pd.DataFrame(columns, index=rows), *frames]


class Pairs:
    """Rows (cells, or means over seeds) that answered the same questions, two and two.

    Attributes
    ----------
    points : ndarray of shape (rows,)
        The metric.
    counts : ndarray of int, shape (rows,)
        Seeds of each row.
    spread : ndarray of shape (rows,)
        Standard deviation over seeds.
    """

    def __init__(self, estimator: Estimator, average: np.ndarray) -> None:
        values = statistics.estimate(estimator.ratios)
        self.points, self.counts = values @ average, np.count_nonzero(average, axis=0)
        self.spread = seeds.spread(values, average)
        self._right, self._unit, self._average = estimator.right, estimator.unit, average
        self._ratios = seeds.average_ratios(estimator.ratios, average)
        #: Right answers of each unit, summed over seeds: (units, rows).
        self._sums = sum_by(estimator.unit, estimator.right.astype(int) @ (average > 0))

    @property
    def questions(self) -> int:
        """Questions that the test counts."""
        return len(self._right)

    def single(self) -> tuple[np.ndarray, np.ndarray]:
        """Interval of every row's metric."""
        return seeds.widen(self.points, *intervals.single(self._ratios), self.spread, self.counts)

    def difference(self, reference: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Difference of rows from a reference row, with its interval."""
        columns = [reference, *rows]
        low, high = (side[1:] for side in intervals.paired([ratio.columns(columns) for ratio in self._ratios]))
        difference = self.points[rows] - self.points[reference]
        low, high = seeds.widen(difference, low, high, self.spread[rows], self.counts[rows])
        base = np.full(len(rows), self.spread[reference]), np.full(len(rows), self.counts[reference])
        return difference, *seeds.widen(difference, low, high, *base)

    def changes(self, reference: int, rows: np.ndarray) -> np.ndarray:
        """Right answers of each unit that rows have more than the reference, times both numbers of seeds."""
        return self._sums[:, rows] * self.counts[reference] - self._sums[:, [reference]] * self.counts[rows]

    def discordant(self, reference: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Questions that only the row, and only the reference (a single cell), gets right; means over seeds."""
        right, base = self._right, self._right[:, np.flatnonzero(self._average[:, reference])[:1]]
        return tuple((side.sum(axis=0) @ self._average)[rows] for side in (right & ~base, base & ~right))  # type: ignore[return-value]

    def share_right(self, row: int) -> float:
        """Share of the questions that a row gets right."""
        return float(self._sums[:, row].sum() / self.counts[row] / self.questions)

    def worth(self, changes: np.ndarray, discordant: np.ndarray) -> int:
        """Number of questions that the test's clustered ones are worth, from the changes of rows that are one cell.

        Without a change to learn from, each unit's questions are taken to change together.
        """
        together = float((np.bincount(self._unit) ** 2.0).sum()) / self.questions
        effect = ((changes**2.0).sum() + together**2) / (discordant.sum() + together)
        return max(1, int(self.questions / max(1.0, effect)))


def _against_dense(pairs: Pairs) -> dict[str, np.ndarray]:
    """Columns that compare every row with the first one, the dense run; dense against itself is no comparison."""
    rows = np.arange(1, len(pairs.points))
    difference, low, high = pairs.difference(0, rows)
    changes = pairs.changes(0, rows)
    only_method, only_dense = pairs.discordant(0, rows)
    p = statistics.sign_flip(changes)
    p_holm = statistics.holm(p)
    alone = pairs.counts[rows] == 1
    n = pairs.worth(changes[:, alone], (only_method + only_dense)[alone])
    gained = round(float(np.median(only_method)) / pairs.questions, 3) if len(rows) else 0.0
    detectable = 100 * power.smallest_drop(n, max(len(rows), 1))
    columns: dict[str, object] = {
        "difference": difference,
        "difference_low": low,
        "difference_high": high,
        "only_method": only_method,
        "only_dense": only_dense,
        "p": p,
        "p_holm": p_holm,
        "rows": float(len(rows)),
        "detectable": detectable,
        "detectable_with_gains": 100 * power.smallest_drop(n, max(len(rows), 1), gained),
        "dense_right": 100 * pairs.share_right(0),
        "mark": marks(p, p_holm, np.where(difference * changes.sum(axis=0) > 0, difference, 0.0), detectable),
    }
    return {name: _at(rows, values, len(pairs.points)) for name, values in columns.items()}


def _at(rows: np.ndarray, values: object, size: int) -> np.ndarray:
    """``values`` at the places ``rows``, nothing elsewhere."""
    values = np.asarray(values)
    out = np.full(
        size, "" if values.dtype.kind in "OU" else np.nan, dtype=object if values.dtype.kind in "OU" else float
    )
    out[rows] = values
    return out


def marks(p: np.ndarray, p_holm: np.ndarray, difference: np.ndarray, detectable: float) -> np.ndarray:
    """How a number is marked beside dense's.

    Parameters
    ----------
    p, p_holm : ndarray
        Exact p-values before and after correction.
    difference : ndarray
        From dense; 0 where the metric and the questions answered right point in opposite directions.
    detectable
        The smallest drop that is found, in points. Where it is beyond :data:`BLIND` nothing is marked: with so few
        questions, a mark would say more about their number than about the method.

    Returns
    -------
    ndarray of str
        ``"tie"``: not told apart from dense, even without correction. ``"lower"``, ``"higher"``: told apart, but not
        after correction. Empty: told apart, or nothing can be.
    """
    if not detectable <= BLIND:
        return np.full(len(p), "", dtype=object)
    alpha = 1 - statistics.LEVEL
    doubted = np.where(difference < 0, "lower", "higher")
    said = np.where(p_holm < alpha, "", doubted)
    return np.where((p >= alpha) | (difference == 0), "tie", said).astype(object)


def _against_control(pairs: Pairs, cells: pd.DataFrame, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Columns that compare rows with the random control that keeps as many visual tokens per layer."""
    names, labels = cells["method_name"].to_numpy(), cells["method"].to_numpy()
    controls = np.flatnonzero((names == "random") & np.isfinite(tokens))
    others = np.flatnonzero((names != "random") & (names != "dense") & np.isfinite(tokens))
    size = len(names)
    columns = {name: np.full(size, np.nan) for name in COLUMNS if name.startswith("control")}
    columns["control"] = np.full(size, "", dtype=object)
    if not len(controls) or not len(others):
        return columns
    apart = np.abs(tokens[others][:, None] - tokens[controls])
    nearest = apart.argmin(axis=1)
    close = apart[np.arange(len(others)), nearest] <= SAME_TOKENS * tokens[controls][nearest]
    for place, control in enumerate(map(int, controls)):
        rows = others[close & (nearest == place)]
        if len(rows):
            bounds = pairs.difference(control, rows)
            for name, values in zip(("control_difference", "control_low", "control_high"), bounds, strict=True):
                columns[name][rows] = values
            columns["control_p"][rows] = statistics.sign_flip(pairs.changes(control, rows))
            columns["control"][rows] = labels[control]
    columns["control_p_holm"] = statistics.holm(columns["control_p"])
    return columns


@dataclass
class Aligned:
    """Questions of a group, the cells (columns) that answered them, and why others are missing."""

    questions: Questions | None
    kept: list
    remarks: dict


def align(results: Results, cells: pd.DataFrame) -> Aligned:
    """Scores of all cells in the question order of the first readable one."""
    reference: pa.Table | None = None
    kept, columns, remarks = [], [], {}
    for index, folder in cells["folder"].items():
        # Parts, units and targets belong to the questions: they are read once, which keeps large stores fast.
        table = results.samples(folder, ["doc_id", "score", *(("part", "unit", "target") if reference is None else ())])
        if table is None:
            remarks[index] = "no statistics: its sample rows cannot be read"
            continue
        if reference is None:
            reference = table
        scores = _in_order(table, reference["doc_id"].to_numpy())
        if scores is None:
            remarks[index] = "no statistics: it answers other questions than the run it is compared with"
            continue
        kept.append(index)
        columns.append(scores)
    if reference is None:
        return Aligned(None, kept, remarks)
    return Aligned(_questions(reference, np.column_stack(columns)), kept, remarks)


def _in_order(table: pa.Table, wanted: np.ndarray) -> np.ndarray | None:
    """A cell's scores in the order of the ``wanted`` questions, or ``None`` if it answered others."""
    own, scores = table["doc_id"].to_numpy(), table["score"].to_numpy()
    if np.array_equal(own, wanted):
        return scores
    by_own, by_wanted = np.argsort(own), np.argsort(wanted)
    if len(own) != len(wanted) or not np.array_equal(own[by_own], wanted[by_wanted]) or len(np.unique(own)) < len(own):
        return None
    ordered = np.empty(len(own))
    ordered[by_wanted] = scores[by_own]
    return ordered


def _questions(table: pa.Table, scores: np.ndarray) -> Questions:
    part, part_names = pd.factorize(table["part"].to_pandas(), use_na_sentinel=False)
    unit, _ = pd.factorize(table["unit"].to_pandas(), use_na_sentinel=False)
    targets = table["target"].to_pandas().astype(str).str.strip().str.lower()
    positive = (targets == "yes").to_numpy() if targets.isin(("yes", "no")).all() else None
    return Questions(scores.astype(float), part, unit, tuple(map(str, part_names)), positive)
