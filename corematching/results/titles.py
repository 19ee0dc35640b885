"""Printed names of benchmarks, and their order."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from corematching.benchmarks.spec import BENCHMARKS, load_benchmark
from corematching.errors import UserError


@cache
def title(benchmark: str) -> str:
    """A benchmark's printed name; a name without a config is printed as it is."""
    try:
        return load_benchmark(benchmark).title
    except UserError:
        return benchmark


def benchmark_order(names: Iterable[str]) -> list[str]:
    """Benchmarks in the order of the paper's tables, others after them by name."""
    return sorted(
        set(names), key=lambda name: (BENCHMARKS.index(name) if name in BENCHMARKS else len(BENCHMARKS), name)
    )
