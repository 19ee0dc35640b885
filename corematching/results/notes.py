"""What a table says below its numbers: which metric, how sure, from how many questions."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from corematching.results.compare import BLIND
from corematching.results.estimators import FALLBACK
from corematching.results.tables import MARKS, PARTIAL, budget
from corematching.results.titles import benchmark_order, title


def interval(cell: dict[str, Any]) -> str:
    """A score's 95 % interval in words; one-sided where the score cannot be higher, or lower."""
    low, high, value = cell["low"], cell["high"], cell["value"]
    if high <= value:
        return f"≥ {low:.1f}"
    return f"≤ {high:.1f}" if low >= value else f"{low:.1f}–{high:.1f}"


def legend(group: pd.DataFrame) -> list[str]:
    """What the marks that a group's cells bear mean, in sentences."""
    used = [f"{symbol}: {meaning}" for key, (symbol, meaning) in MARKS.items() if (group["mark"] == key).any()]
    told = "; ".join(used) + " (exact McNemar test on questions answered right, p < 0.05, Holm's correction)."
    partly = f"{PARTIAL}: from a part of its subtasks, left out of % of dense."
    return [*([told] if used else []), *([partly] if (group["partial"] != "").any() else [])]


def statistical_notes(group: pd.DataFrame) -> list[str]:
    """One line each: metrics, subtasks, limits at extremes, power, seeds, the random control."""
    return [
        *_metric_notes(group),
        *_one_sided_note(group),
        *_power_notes(group),
        *_seed_note(group),
        *_control_note(group),
    ]


def _metric_notes(group: pd.DataFrame) -> list[str]:
    done = group[group["status"] == "done"]
    notes = []
    for benchmark in benchmark_order(done["benchmark"]):
        cells = done[done["benchmark"] == benchmark]
        metrics = ", ".join(sorted(set(cells["metric"]) - {""}))
        remarks = sorted(set(cells["note"]) - {""})
        partly = sorted(set(cells["partial"]) - {""})
        remarks += [f"computed from {what}, so it is left out of % of dense" for what in partly]
        if (cells["estimator"] == FALLBACK).any():
            remarks.append("its intervals are of the mean question score, in percent")
        if metrics not in ("", "accuracy") or remarks:
            notes.append("; ".join([f"{title(benchmark)}: {metrics}", *remarks]) + ".")
    return notes


def _one_sided_note(group: pd.DataFrame) -> list[str]:
    """Scores that cannot be higher, or lower, and what they are sure of."""
    found: dict[str, int] = {}
    extreme = (group["high"] <= group["value"]) | (group["low"] >= group["value"])
    for cell in group[extreme].to_dict("records"):
        means = f"{title(cell['benchmark'])} {cell['value']:.1f} means {interval(cell)}"
        found.setdefault(means, int(cell["questions"]))
    listed = ", ".join(f"{text} (n = {n})" for text, n in found.items())
    return [f"Where every answer is right, or wrong, the 95 % interval is one-sided: {listed}."] if listed else []


def _power_notes(group: pd.DataFrame) -> list[str]:
    tested = group[group["rows"].notna()].groupby("benchmark", sort=False).first()
    if tested.empty:
        return []
    sure, blind = [], []
    for benchmark in benchmark_order(tested.index):
        cell = tested.loc[benchmark]
        if not cell["detectable"] <= BLIND:
            blind.append(f"{title(benchmark)} (n = {cell['questions']:g})")
            continue
        gains = cell["detectable_with_gains"]
        beside = f" ({gains:.1f})" if math.isfinite(gains) and round(gains, 1) > round(cell["detectable"], 1) else ""
        more = ", more than dense has" if cell["detectable"] > cell["dense_right"] else ""
        sure.append(f"{title(benchmark)} {cell['detectable']:.1f}{beside}{more}")
    rows = sorted({int(count) for count in tested["rows"]})
    over = f"{rows[0]} row{'s' if rows[-1] > 1 else ''}" if len(rows) == 1 else f"{rows[0]} to {rows[-1]} rows"
    notes = []
    if sure:
        brackets = " (in brackets: if as many are gained as here)" if any("(" in text for text in sure) else ""
        notes.append(
            f"Smallest drop from dense that the exact McNemar test, corrected over {over}, finds with 80 % power, in"
            f" points of questions answered right, whatever the metric, if no answer is gained{brackets}:"
            f" {', '.join(sure)}."
        )
    if blind:
        notes.append(
            f"Too few questions to tell any row from dense: {', '.join(blind)}. A drop of {BLIND:g} points would be"
            f" missed more often than one time in five (exact McNemar test, corrected over {over}): nothing is marked."
        )
    return notes


def _seed_note(group: pd.DataFrame) -> list[str]:
    averaged = group[group["seeds"] > 1]
    if averaged.empty:
        return []
    counts = {f"{label} {int(seeds)}" for label, seeds in averaged[["method", "seeds"]].itertuples(index=False)}
    return [
        f"Means over a method's seeds, ± their standard deviation: {', '.join(sorted(counts))} seeds. Their intervals"
        " cover the choice of questions and of seeds."
    ]


def _control_note(group: pd.DataFrame) -> list[str]:
    compared = group[group["control_p_holm"].notna()]
    if compared.empty:
        return []
    beats = (compared["control_p_holm"] < 0.05) & (compared["control_difference"] > 0)
    none = ~beats.groupby(compared["row"]).transform("any")
    rows = compared[none].drop_duplicates("row")
    names = [f"{row.method} {budget(row.keep)}" for row in rows.itertuples()]
    if not names:
        return []
    return [
        "Not better than the random control with as many tokens/layer on any benchmark (exact McNemar test, corrected"
        f" over the rows with such a control): {', '.join(names)}."
    ]
