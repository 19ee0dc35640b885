"""The accuracy tables: methods by benchmarks, ablations, and scaling over the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from corematching.results.columns import ANSWER, ANSWERS, COSTS, NEURONS, SHARE, TOKENS, capped_text, runaway_note
from corematching.results.notes import interval, legend, statistical_notes
from corematching.results.order import CONTROLS, keep_order, line_order
from corematching.results.selection import CONTEXT, varied_parameters
from corematching.results.tables import (
    HOLE,
    MINI_BANNER,
    PARTIAL,
    Column,
    Entry,
    Row,
    Table,
    budget,
    hole,
    mark,
    number,
    quantity,
    word,
)
from corematching.results.titles import benchmark_order, title

FAMILY = ("core_tokens", "core_neurons", "corematching", "corematching_release")


def contexts(cells: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Cells that share a table, with a suffix for the table's name (empty if there is only one)."""
    groups = [(key, group) for key, group in cells.groupby(CONTEXT, sort=True)]
    if len(groups) == 1:
        return [("", groups[0][1])]
    varied = [place for place in range(len(CONTEXT)) if len({key[place] for key, _ in groups}) > 1]
    return [("".join(f"_{key[place]}" for place in varied if key[place]), group) for key, group in groups]


def methods_of(group: pd.DataFrame) -> pd.DataFrame:
    """One line per row of a table: dense first, then by budget from large to small, each as the experiment lists them.

    Where no experiment says, controls come before the others, and those by name.
    """
    rows = group.drop_duplicates("row")[["row", "method", "method_name", "keep", "parameters", "place"]]
    order = [
        (*line_order(name, keep), place, name not in CONTROLS, label)
        for label, name, keep, place in rows[["method", "method_name", "keep", "place"]].itertuples(index=False)
    ]
    return rows.iloc[sorted(range(len(rows)), key=order.__getitem__)]


def accuracy_table(group: pd.DataFrame, suffix: str = "", notes: Sequence[str] = ()) -> Table:
    """Methods and budgets by benchmarks, with the mean share of dense, visual tokens per layer and FLOPs."""
    benchmarks = benchmark_order(group["benchmark"])
    cells, dense = _by_row(group), dense_values(group)
    rows = []
    for method in methods_of(group).itertuples():
        own = cells[method.row]
        entries = [
            word(method.method),
            word(_keep(method)),
            *(score_entry(own.get(benchmark)) for benchmark in benchmarks),
            _share(own, dense),
            *(quantity(cost, _mean(own, cost.key), _absence(own)) for cost in COSTS),
            *_answers(own),
        ]
        rows.append(Row(tuple(entries), None if method.method_name == "dense" else _keep(method)))
    columns = (
        Column("method", "Method", numeric=False),
        Column("keep", "Keep"),
        *(Column(name, title(name), "higher") for name in benchmarks),
        Column(SHARE.key, SHARE.title, SHARE.better),
        *(Column(cost.key, cost.title) for cost in (*COSTS, *ANSWERS)),
    )
    caption = _caption(group, "Accuracy on " + _count(len(benchmarks), "benchmark"), costs=True)
    return mark(_table(f"accuracy{suffix}", "Accuracy per method and budget", caption, columns, rows, group, notes))


def scaling_table(group: pd.DataFrame, suffix: str = "") -> Table | None:
    """Benchmarks and methods by budgets, with intervals; ``None`` below two budgets."""
    kept = group[group["method_name"] != "dense"]
    keeps = sorted({keep for keep in kept["keep"] if keep is not None and keep == keep}, key=keep_order)
    if len(keeps) < 2:
        return None
    cells = _by_row(group)
    dense = next(
        (row for row, own in cells.items() if any(cell["method_name"] == "dense" for cell in own.values())), ""
    )
    variants: dict[str, dict[str, str]] = {}
    for method in methods_of(kept).itertuples():
        variants.setdefault(method.method, {})[budget(method.keep)] = method.row
    swept = {label: rows for label, rows in variants.items() if rows.keys() & set(map(budget, keeps))}
    rows = []
    for benchmark in benchmark_order(group["benchmark"]):
        for label, row_of in swept.items():
            shown = [dense, *(row_of.get(budget(keep), "") for keep in keeps)]
            scores = [score_entry(cells.get(row, {}).get(benchmark), spread=True) for row in shown]
            rows.append(Row((word(title(benchmark)), word(label), *scores), benchmark))
    columns = (
        Column("benchmark", "Benchmark", numeric=False),
        Column("method", "Method", numeric=False),
        Column("dense", "all (dense)"),
        *(Column(budget(keep), budget(keep), "higher") for keep in keeps),
    )
    caption = _caption(group, "Score over the budget (visual tokens kept, or the kept fraction)")
    caption += " In brackets: the 95 % interval of the score itself; one-sided where every answer is right or wrong."
    return mark(_table(f"scaling{suffix}", "Scaling over keep", caption, columns, rows, group))


def ablation_table(group: pd.DataFrame, suffix: str = "") -> Table | None:
    """CoreMatching's halves and choices; ``None`` if no method of the family has variants other than in its budget."""
    family = group[group["method_name"].isin(FAMILY)]
    variants = methods_of(family)
    parameters = varied_parameters([{"method": row.method_name, **row.parameters} for row in variants.itertuples()])
    if not any(varied_parameters(list(own)) for _, own in variants.groupby("method_name")["parameters"]):
        return None  # a sweep over keep, which the scaling table shows
    benchmarks = benchmark_order(group["benchmark"])
    cells, dense = _by_row(group), dense_values(group)
    ordered = [*methods_of(group[group["method_name"] == "dense"]).itertuples(), *variants.itertuples()]
    rows = []
    for method in ordered:
        own = cells[method.row]
        chosen = {"method": method.method_name, **method.parameters}
        entries = [
            word(method.method),
            *(word(_parameter(chosen.get(name))) for name in parameters),
            word(_keep(method)),
            *(score_entry(own.get(benchmark)) for benchmark in benchmarks),
            _share(own, dense),
            quantity(TOKENS, _mean(own, TOKENS.key), _absence(own)),
            _neurons(own),
            *_answers(own),
        ]
        rows.append(Row(tuple(entries), None if method.method_name == "dense" else "variants"))
    columns = (
        Column("label", "Variant", numeric=False),
        *(Column(name, name, numeric=False) for name in parameters),
        Column("keep", "Keep"),
        *(Column(name, title(name), "higher") for name in benchmarks),
        Column(SHARE.key, SHARE.title, SHARE.better),
        *(Column(what.key, what.title) for what in (TOKENS, NEURONS, *ANSWERS)),
    )
    caption = _caption(group, "Halves and choices of CoreMatching; parameters that no row varies are left out")
    caption += " Neurons/layer is the mean count of FFN neurons used in decode over the layers that are sliced."
    return mark(_table(f"ablation{suffix}", "Ablations", caption, columns, rows, group))


def score_entry(cell: dict | None, spread: bool = False) -> Entry:
    """The score of one cell (``None``: there is no such cell) with what is known about it."""
    if cell is None:
        return hole("not run")
    if cell["status"] == "failed":
        return hole(f"failed: {cell['error']}"[:160], cell["id"])
    if cell["status"] == "not_scored" or not math.isfinite(cell["value"]):
        return hole(f"not scored: {cell['note'] or 'no score was stored'}"[:160], cell["id"])
    beside = f" ± {cell['seed_spread']:.1f}" if math.isfinite(cell["seed_spread"]) else ""
    if spread and math.isfinite(cell["low"]):
        beside = f" ({interval(cell)})"
    if cell["partial"]:
        beside += f" {PARTIAL}"
    return number(cell["value"], spread=beside, doubt=cell["mark"], detail=_detail(cell), cell=cell["id"])


def _detail(cell: dict) -> str:
    parts = [f"n = {cell['n']:g}"]
    if math.isfinite(cell["low"]):
        parts.append(f"95 % interval {interval(cell)} ({cell['estimator']})")
    if math.isfinite(cell["difference"]):
        bounds = f"{cell['difference_low']:+.1f} to {cell['difference_high']:+.1f}"
        parts.append(f"difference from dense {cell['difference']:+.1f} ({bounds})")
    if math.isfinite(cell["p_holm"]):
        corrected = f"corrected over {cell['rows']:g} rows {cell['p_holm']:.2g}"
        parts.append(f"exact McNemar p = {cell['p']:.2g}, {corrected}")
    if math.isfinite(cell["control_difference"]):
        bounds = f"{cell['control_low']:+.1f} to {cell['control_high']:+.1f}"
        parts.append(f"difference from {cell['control']} {cell['control_difference']:+.1f} ({bounds})")
    if cell["seeds"] > 1:
        parts.append(f"mean of {cell['seeds']:g} seeds, standard deviation {cell['seed_spread']:.2g}")
    partly = f"computed from {cell['partial']}" if cell["partial"] else ""
    return "; ".join([*parts, *filter(None, [partly, cell["remark"]])])


def accuracy_shares(group: pd.DataFrame) -> dict[str, float]:
    """Mean share of dense (%) per row key, for the rows that have a score wherever dense has one."""
    dense = dense_values(group)
    entries = {row: _share(own, dense) for row, own in _by_row(group).items()}
    return {row: entry.value for row, entry in entries.items() if entry.value is not None}


def _by_row(group: pd.DataFrame) -> dict[str, dict[str, dict]]:
    """Cells as dictionaries, by row key and benchmark: looking them up in a frame costs a hundred times as much."""
    cells: dict[str, dict[str, dict]] = {}
    for cell in group.to_dict("records"):
        cells.setdefault(cell["row"], {})[cell["benchmark"]] = cell
    return cells


def dense_values(group: pd.DataFrame) -> dict[str, float]:
    """Dense scores that shares can be taken of: not of metrics that are computed from a part of their subtasks."""
    whole = (group["status"] == "done") & (group["value"] > 0) & (group["partial"] == "")
    done = group[whole & (group["method_name"] == "dense")]
    return dict(zip(done["benchmark"], done["value"], strict=True))


def _share(own: dict[str, dict], dense: dict[str, float]) -> Entry:
    """Mean over the benchmarks that dense has a score on; a hole if this row lacks one of them (a biased mean)."""
    if not dense:
        return hole("no dense score to compare with")
    values = {name: own[name]["value"] if name in own else math.nan for name in dense}
    absent = [title(name) for name in benchmark_order(values) if not math.isfinite(values[name])]
    if absent:
        return hole(f"no score on {', '.join(absent)}, which dense has")
    return number(100 * float(np.mean([values[name] / dense[name] for name in dense])))


def _neurons(own: dict[str, dict]) -> Entry:
    layers = [count for cell in own.values() for count in cell["neurons_by_layer"] or () if count is not None]
    return number(float(np.mean(layers)), 0) if layers else word("all")


def _answers(own: dict[str, dict]) -> tuple[Entry, Entry]:
    """Tokens per answer, and how many answers hit the cap on new tokens."""
    capped = [cell["capped_answers"] for cell in own.values() if cell["status"] == "done"]
    ended = [cell["ended_answers"] for cell in own.values() if cell["status"] == "done"]
    text = capped_text(sum(capped), sum(capped) + sum(ended)) if capped else None
    hit = Entry(text, float(sum(capped))) if text else hole("the cells do not say how their answers ended")
    return quantity(ANSWER, _mean(own, ANSWER.key), _absence(own)), hit


def _keep(method) -> str:
    adaptive = method.keep is None and method.method_name != "dense"
    return "adaptive" if adaptive else budget(method.keep)


def _parameter(value: object) -> str:
    return HOLE if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _absence(own: dict[str, dict]) -> str:
    errors = [cell["error"] for cell in own.values() if cell["error"]]
    return f"failed: {errors[0]}"[:160] if errors else "the cells hold no trace"


def _mean(own: dict[str, dict], name: str) -> float:
    values = [cell[name] for cell in own.values() if math.isfinite(cell[name])]
    return float(np.mean(values)) if values else math.nan


def _count(number_of: int, noun: str) -> str:
    return f"{number_of} {noun}" + ("" if number_of == 1 else "s")


def _caption(group: pd.DataFrame, subject: str, costs: bool = False) -> str:
    first = group.iloc[0]
    sizes = sorted({int(n) for n in group.loc[group["status"] == "done", "n"].dropna()})
    n = f"n = {sizes[0]}" if len(sizes) == 1 else f"n = {sizes[0]} to {sizes[-1]}" if sizes else "n unknown"
    sentences = [
        f"{subject}.",
        f"Model {first['model']} ({first['dtype'] or 'unknown precision'}), data {first['data']},"
        f" prompt {first['prompt']}, {n} questions per benchmark.",
        "Tokens/layer is the mean count of visual tokens entering a decoder layer, from the trace.",
    ]
    if costs:
        sentences.append(
            "GFLOPs per question: 2 per multiply-add; vision tower, projector, prefill, decode, output head and"
            " method overhead together. % of dense is the mean over benchmarks of score / dense score."
        )
    sentences.append(f"Bold: best, underlined: second best of a budget (dense apart). {HOLE}: no number.")
    sentences += legend(group)
    return " ".join(sentences)


def _table(
    name: str, heading: str, caption: str, columns, rows, group: pd.DataFrame, notes: Sequence[str] = ()
) -> Table:
    banner = MINI_BANNER if (group["data"] == "mini").any() else ""
    remarks = [*_runaway_note(group), *statistical_notes(group), *notes]
    return Table(name, heading, caption, tuple(columns), tuple(rows), tuple(remarks), banner)


def _runaway_note(group: pd.DataFrame) -> list[str]:
    done = group[group["status"] == "done"]
    names = ["benchmark", "method", "keep", "capped_answers", "ended_answers", "cap"]
    told = runaway_note(
        [
            (f"{title(benchmark)}, {method}{'' if keep is None else f' {budget(keep)}'}:", capped, capped + ended, cap)
            for benchmark, method, keep, capped, ended, cap in done[names].itertuples(index=False)
        ]
    )
    return [told] if told else []
