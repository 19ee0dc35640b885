"""Two experiment folders side by side: every cell that both hold, its difference, interval and test."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from corematching.benchmarks.spec import BENCHMARKS
from corematching.errors import UserError
from corematching.results import statistics
from corematching.results.compare import Pairs, align
from corematching.results.estimators import choose
from corematching.results.load import Results, keep_order, load_results
from corematching.results.selection import differences, select
from corematching.results.tables import MINI_BANNER, Column, Entry, Row, Table, budget, hole, number, significant, word
from corematching.results.titles import title

#: What makes two cells the same comparison; of the first three, what each folder has one of may differ.
PLACE = ["model", "data", "prompt"]
CELL = ["limits", "benchmark", "method", "keep_text", "method_seed"]


@dataclass(frozen=True)
class _Difference:
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    only_first: float = math.nan
    only_second: float = math.nan
    p: float = math.nan
    changed: float = math.nan
    """Per cent of the answers whose text is another."""
    reason: str = ""


def compare_folders(first: Path | str, second: Path | str) -> Table:
    """Compare two experiments cell by cell.

    Parameters
    ----------
    first, second
        Experiment folders. Cells belong together if benchmark, method label, budget and seed of the method agree, and
        model, data and prompt, unless each folder has one and they differ.

    Returns
    -------
    Table
        One row per common cell: both scores, second minus first with its paired interval, and McNemar's exact test.
        The notes say what only one folder holds and in what settings common cells differ.

    Raises
    ------
    UserError
        If a folder is no experiment folder, or the two have no cell in common.
    """
    loaded = [load_results([folder]) for folder in (first, second)]
    chosen = [select(results.cells)[0] for results in loaded]
    chosen = [cells.assign(keep_text=[budget(keep) for keep in cells["keep"]]) for cells in chosen]
    names = [Path(first).name or str(first), Path(second).name or str(second)]
    names = names if names[0] != names[1] else [str(first), str(second)]
    apart = [name for name in PLACE if _single(chosen[0][name], chosen[1][name])]
    keys = [name for name in PLACE if name not in apart] + CELL
    one, other = ({_place(cell, keys): cell for cell in cells.to_dict("records")} for cells in chosen)
    common = sorted((key for key in one if key in other), key=lambda key: _order(one[key]))
    if not common:
        raise UserError(
            f"{first} and {second} have no cell in common (same benchmark, method label, keep, model, data and prompt)"
        )
    found = [_difference(loaded[0], one[key], other[key]) for key in common]
    corrected = statistics.holm(np.array([difference.p for difference in found]))
    rows = [
        _row(one[key], other[key], difference, p) for key, difference, p in zip(common, found, corrected, strict=True)
    ]
    notes = [
        f"{name}: {chosen[0][name].iloc[0]} in {names[0]}, {chosen[1][name].iloc[0]} in {names[1]}." for name in apart
    ]
    notes += _settings(one, other, common)
    for name, own, theirs in ((names[0], one, other), (names[1], other, one)):
        alone = sorted({f"{cell['method']} {cell['keep_text']}" for key, cell in own.items() if key not in theirs})
        count = sum(key not in theirs for key in own)
        notes += (
            [f"Only in {name}: {count} cells ({', '.join(alone[:8])}{', …' if len(alone) > 8 else ''})."]
            if count
            else []
        )
    banner = MINI_BANNER if any((cells["data"] == "mini").any() for cells in chosen) else ""
    caption = (
        f"{names[1]} less {names[0]}, on the same questions: 95 % intervals of paired differences; exact McNemar test,"
        f" corrected over the {len(common)} rows by Holm. ✓: questions that only one of the two answers right."
        " Changed: answers whose text is another, right or wrong."
    )
    return Table(
        "comparison", f"{names[0]} and {names[1]}", caption, _columns(names), tuple(rows), tuple(notes), banner
    )


def _single(one: pd.Series, other: pd.Series) -> bool:
    return one.nunique() == other.nunique() == 1 and one.iloc[0] != other.iloc[0]


def _place(cell: dict[str, Any], keys: list[str]) -> tuple[Hashable, ...]:
    return tuple(cell[name] for name in keys)


def _order(cell: dict[str, Any]) -> tuple[Any, ...]:
    name = cell["benchmark"]
    place = BENCHMARKS.index(name) if name in BENCHMARKS else len(BENCHMARKS)
    return (
        *(cell[part] for part in PLACE),
        place,
        name,
        cell["method_name"] != "dense",
        cell["method"],
        keep_order(cell["keep"]),
        cell["method_seed"],
    )


def _columns(names: list[str]) -> tuple[Column, ...]:
    return (
        Column("benchmark", "Benchmark", numeric=False),
        Column("method", "Method", numeric=False),
        Column("keep", "Keep"),
        Column("first", names[0]),
        Column("second", names[1]),
        Column("difference", "Difference"),
        Column("interval", "95 % interval"),
        Column("only_first", f"✓ {names[0]}"),
        Column("only_second", f"✓ {names[1]}"),
        Column("p", "p"),
        Column("p_holm", "p, corrected"),
        Column("changed", "Changed answers, %"),
    )


def _row(one: dict[str, Any], other: dict[str, Any], difference: _Difference, corrected: float) -> Row:
    reason = difference.reason or "no statistics"
    known = math.isfinite(difference.low)
    interval = Entry(f"{difference.low:+.1f} to {difference.high:+.1f}") if known else hole(reason)
    return Row(
        (
            word(title(one["benchmark"])),
            word(one["method"]),
            word(one["keep_text"]),
            *(number(cell["value"], reason=cell["status"].replace("_", " "), cell=cell["id"]) for cell in (one, other)),
            number(difference.value, reason=reason),
            interval,
            number(difference.only_first, 0, reason=reason),
            number(difference.only_second, 0, reason=reason),
            significant(difference.p, 2, reason=reason),
            significant(corrected, 2, reason=reason),
            number(difference.changed, reason=reason),
        ),
        one["benchmark"],
    )


def _difference(results: Results, one: dict[str, Any], other: dict[str, Any]) -> _Difference:
    pair = pd.DataFrame([one, other])
    value = other["value"] - one["value"]
    if not math.isfinite(value):
        return _Difference(reason="no score in one of the two")
    if one["metric"] != other["metric"]:
        return _Difference(reason=f"one is {one['metric']}, the other {other['metric']}")
    aligned = align(results, pair)
    if aligned.remarks or aligned.questions is None:
        return _Difference(value, reason=next(iter(aligned.remarks.values()), "no questions"))
    estimator = choose(aligned.questions, pair["value"].to_numpy(dtype=float))
    pairs, second = Pairs(estimator, np.eye(2)), np.array([1])
    _, low, high = pairs.difference(0, second)
    only_second, only_first = pairs.discordant(0, second)
    p = float(statistics.sign_flip(pairs.changes(0, second))[0])
    bounds, only = (float(low[0]), float(high[0])), (float(only_first[0]), float(only_second[0]))
    return _Difference(value, *bounds, *only, p, _changed(results, one, other))


def _changed(results: Results, one: dict[str, Any], other: dict[str, Any]) -> float:
    """Per cent of the questions whose answers read differently; NaN where they cannot be read."""
    answers: list[dict[Any, Any]] = []
    for cell in (one, other):
        table = results.samples(cell["folder"], ["doc_id", "prediction"])
        if table is None:
            return math.nan
        answers.append(dict(zip(table["doc_id"].to_pylist(), table["prediction"].to_pylist(), strict=True)))
    first, second = answers
    return 100 * sum(answer != second[question] for question, answer in first.items()) / max(len(first), 1)


def _settings(one: dict, other: dict, common: list) -> list[str]:
    """What the configurations of common cells differ in besides what was asked to differ."""
    same = sum(one[key]["id"] == other[key]["id"] for key in common)
    notes = [f"{same} of {len(common)} cells are the same cell in both."] if same else []
    groups = [(key, [_all_settings(one[key]), _all_settings(other[key])]) for key in common]
    said = differences(groups)
    return [*notes, f"They differ in {said}."] if said else notes


def _all_settings(cell: dict[str, Any]) -> dict[str, Any]:
    own = {f"method.{name}": value for name, value in cell["parameters"].items()}
    return {**cell["settings"], **own, "benchmark.limit": cell["limit"], "benchmark.version": cell["version"]}
