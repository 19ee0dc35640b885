"""The ten benchmarks: what they are, where their rows come from, how they are asked and how they are scored.

Light to import; whoever needs them imports `corematching.benchmarks.tasks` (lmms-eval) and
`corematching.benchmarks.scoring` (pandas).
"""

from corematching.benchmarks.data import DataSource, load_source
from corematching.benchmarks.judge import Judge, load_judge
from corematching.benchmarks.spec import BENCHMARKS, Benchmark, available_benchmarks, load_benchmark

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "DataSource",
    "Judge",
    "available_benchmarks",
    "load_benchmark",
    "load_judge",
    "load_source",
]
