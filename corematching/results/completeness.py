"""Whether a metric that is put together from subtasks has all of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from corematching.benchmarks.spec import MME_COGNITION, load_benchmark
from corematching.errors import UserError


@cache
def subtasks(benchmark: str, metric: str) -> frozenset[str]:
    """The subtasks that a benchmark's metric is the sum or mean of; empty where it has none."""
    try:
        spec = load_benchmark(benchmark)
    except UserError:
        return frozenset()
    if spec.metric.kind == "mme":
        names = frozenset(spec.columns["category"].values)
        return names - frozenset(MME_COGNITION) if metric == "perception" else names
    return frozenset(part.split for part in spec.parts) if spec.metric.kind == "pope" else frozenset()


def partial(benchmark: str, metric: str, present: Collection[str]) -> str:
    """In words, what a metric was computed from if some of its subtasks have no question, e.g. "3 of 14 subtasks".

    Parameters
    ----------
    benchmark, metric
        Names, as stored with the cell.
    present
        Subtasks of the cell's questions. A single nameless one says nothing.

    Returns
    -------
    str
        Empty if nothing is missing.
    """
    wanted = subtasks(benchmark, metric)
    held = wanted & set(present)
    return f"{len(held)} of {len(wanted)} subtasks" if wanted and held and held != wanted else ""


def partial_record(record: Mapping[str, Any]) -> str:
    """The same for a stored record, from the subtasks among its metrics."""
    name, score = record["labels"]["benchmark"], record.get("score") or {}
    held = record.get("metrics") or {}
    wanted = subtasks(name, str(score.get("metric")))
    return partial(name, str(score.get("metric")), {part for part in wanted if part in held or f"f1_{part}" in held})
