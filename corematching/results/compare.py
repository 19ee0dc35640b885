"""Compare every accuracy cell with the dense run of the same model on the same questions."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from corematching.results import statistics
from corematching.results.estimators import Questions, choose
from corematching.results.load import Results

#: Cells that may stand in one table.
CONTEXT = ["model", "data", "prompt"]
#: Cells that answered the same questions.
QUESTIONS = [*CONTEXT, "benchmark", "version", "limit"]
COLUMNS = (
    *("low", "high", "difference", "difference_low", "difference_high", "standard_error", "only_method", "only_dense"),
    *("p", "p_holm", "detectable", "questions", "units"),
)


def select(cells: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Choose the accuracy cells that a table can show.

    Of each benchmark's question sets (data versions, limits) the largest is taken. Cells that differ only in what a
    table does not show (seed, revision, generation settings) are reduced to the one finished last; a finished cell wins
    over a failed one. Two sets of parameters under one label get the parameters that differ added to the label.

    Returns
    -------
    cells : pandas.DataFrame
        One row per method and parameters in each context, with ``row``, the key of those.
    notes : list of str
        What was left aside, in words.
    """
    chosen = cells[cells["kind"] == "accuracy"].copy()
    chosen["row"] = [
        json.dumps([label, parameters], sort_keys=True, default=str)
        for label, parameters in chosen[["method", "parameters"]].itertuples(index=False)
    ]
    chosen, notes = _largest_question_set(chosen)
    key = [*CONTEXT, "benchmark", "row"]
    # Failed cells first, then by the time they finished: the last of each row is the one to show.
    chosen = chosen.assign(done=chosen["status"] == "done").sort_values(["done", "finished", "id"], kind="stable")
    repeated = int(chosen.duplicated(key, keep="last").sum())
    if repeated:
        notes.append(f"{repeated} cells repeat others but for seed or settings; the one finished last is shown.")
    chosen = chosen.drop_duplicates(key, keep="last").sort_index().drop(columns="done")
    return _distinct_labels(chosen.reset_index(drop=True)), notes


def _largest_question_set(cells: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    notes: list[str] = []
    kept = []
    for (model, _, _, benchmark), group in cells.groupby([*CONTEXT, "benchmark"], sort=False):
        sets = group.groupby(["version", "limit"], dropna=False, sort=False)
        sizes = sets["n"].transform("max").fillna(0)
        # Ties (two versions of equal size) go to the one finished last.
        best = group.assign(size=sizes).sort_values(["size", "finished", "id"], kind="stable").iloc[-1]
        same = (group["version"] == best["version"]) & ((group["limit"] == best["limit"]) | group["limit"].isna())
        if not same.all():
            notes.append(
                f"{benchmark} ({model}): {int((~same).sum())} cells on other or fewer questions are not shown; "
                f"the table is of n = {best['n']:g}."
            )
        kept.append(group[same])
    return (pd.concat(kept).sort_index() if kept else cells), notes


def _distinct_labels(cells: pd.DataFrame) -> pd.DataFrame:
    labels = cells["method"].copy()
    names = cells["method"] + "\x00" + cells["keep"].map(str)
    for _, group in cells.groupby(names, sort=False):
        variants = dict(zip(group["row"], group["parameters"], strict=True))
        if len(variants) == 1:
            continue
        varied = varied_parameters(list(variants.values()))
        for index, parameters in group["parameters"].items():
            labels[index] = (
                f"{group['method'].iloc[0]} ({', '.join(f'{name}={parameters.get(name)}' for name in varied)})"
            )
    return cells.assign(method=labels)


def varied_parameters(variants: list[dict]) -> list[str]:
    """Names of the parameters (``keep`` apart) that differ between ``variants``, in order of appearance."""
    names = list(dict.fromkeys(name for variant in variants for name in variant if name != "keep"))
    return [
        name
        for name in names
        if len({json.dumps(variant.get(name), sort_keys=True, default=str) for variant in variants}) > 1
    ]


def compare(results: Results, cells: pd.DataFrame, draws: int = statistics.DRAWS) -> pd.DataFrame:
    """Intervals and tests for selected accuracy cells.

    Parameters
    ----------
    results
        The stores, for the sample rows.
    cells
        What :func:`select` returned.
    draws
        Bootstrap resamples.

    Returns
    -------
    pandas.DataFrame
        ``cells`` with :data:`COLUMNS` added (in points of the benchmark's own scale; NaN where nothing can be said),
        ``tie`` (bool: not told apart from dense), ``estimator`` (what the interval is of) and ``remark``. ``p_holm``
        corrects over all methods and budgets that share one dense cell.
    """
    out = cells.assign(**dict.fromkeys(COLUMNS, np.nan), tie=False, estimator="", remark="")
    done = out[(out["status"] == "done") & out["value"].notna()]
    for _, group in done.groupby(QUESTIONS, dropna=False, sort=False):
        for frame in _group(results, group, draws):
            out.loc[frame.index, frame.columns] = frame
    return out


def _group(results: Results, group: pd.DataFrame, draws: int) -> list[pd.DataFrame]:
    """Statistics of the cells that answered one benchmark's questions in one context."""
    dense = group.index[group["method_name"] == "dense"]
    order = [*dense, *group.index.difference(dense, sort=False)]
    aligned = _align(results, group.loc[order])
    frames = [pd.DataFrame({"remark": aligned.remarks}, dtype=object)] if aligned.remarks else []
    if aligned.questions is None or not len(aligned.questions.scores):
        return frames
    cells = group.loc[aligned.kept]
    estimator = choose(aligned.questions, cells["value"].to_numpy())
    replicates = statistics.bootstrap(estimator.ratios, estimator.strata, draws)
    low, high = statistics.interval(replicates)
    columns: dict[str, object] = {
        "low": low,
        "high": high,
        "questions": float(len(aligned.questions.scores)),
        "units": float(aligned.questions.units),
        "estimator": estimator.name,
    }
    if len(dense) and cells.index[0] == dense[0]:
        point = statistics.estimate(estimator.ratios)
        columns |= _paired(aligned.questions.scores >= 0.5, point, replicates)
    return [pd.DataFrame(columns, index=cells.index), *frames]


def _paired(right: np.ndarray, point: np.ndarray, replicates: np.ndarray) -> dict[str, np.ndarray]:
    """Columns that compare every cell with the first one, the dense run."""
    differences = replicates - replicates[:, :1]
    low, high = statistics.interval(differences)
    error = np.nanstd(differences, axis=0, ddof=1)
    only_method, only_dense = (right & ~right[:, :1]).sum(axis=0), (right[:, :1] & ~right).sum(axis=0)
    p = statistics.mcnemar(only_method, only_dense)
    p[0] = np.nan  # dense against itself is no test
    p_holm = statistics.holm(p)
    columns = {
        "difference": point - point[0],
        "difference_low": low,
        "difference_high": high,
        "standard_error": error,
        "only_method": only_method.astype(float),
        "only_dense": only_dense.astype(float),
        "p": p,
        "p_holm": p_holm,
        "detectable": np.where(error > 0, statistics.detectable_difference(error), np.nan),
        # Either doubt makes a tie: an interval that holds zero, or a corrected test that does not reject.
        "tie": ((low <= 0) & (high >= 0)) | (p_holm >= 1 - statistics.LEVEL),
    }
    for name, values in columns.items():
        values[0] = False if name == "tie" else np.nan
    return columns


@dataclass
class _Aligned:
    """Questions of a group, the cells (columns) that answered them, and why others are missing."""

    questions: Questions | None
    kept: list
    remarks: dict


def _align(results: Results, cells: pd.DataFrame) -> _Aligned:
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
        return _Aligned(None, kept, remarks)
    return _Aligned(_questions(reference, np.column_stack(columns)), kept, remarks)


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
