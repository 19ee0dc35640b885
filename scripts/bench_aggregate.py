"""Measure aggregation on synthetic stores: seconds, peak memory and growth with the number of cells.

Usage: ``python scripts/bench_aggregate.py [--cells 10000] [--rows 500] [--folder FOLDER]``

Stores of a quarter, half and all of the cells are written (not timed) and aggregated, each in a fresh process.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

METHODS = ("dense", "random", "uniform", "fastv", "core_tokens", "corematching")
BENCHMARKS = ("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench", "seedbench", "mmvet")


def write(folder: Path, cells: int, rows: int) -> Path:
    """A store of about ``cells`` cells: models x ten benchmarks x (dense + five methods x 20 budgets)."""
    from synthetic_store import write_store

    keeps = range(12, 572, 28)
    per_model = len(BENCHMARKS) * (1 + (len(METHODS) - 1) * len(keeps))
    models = [f"model_{index}" for index in range(max(1, round(cells / per_model)))]
    return write_store(folder, methods=METHODS, keeps=keeps, benchmarks=BENCHMARKS, models=models, n=rows, per_unit=3)


def measure(experiment: Path, out: Path) -> None:
    """Aggregate one store in this process and print one line."""
    from corematching.results.aggregate import aggregate, write_tables

    start = time.perf_counter()
    aggregation = aggregate([experiment])
    write_tables(aggregation, out)
    seconds = time.perf_counter() - start
    own, others = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    gigabytes = (own + len(os.sched_getaffinity(0)) * others) / 2**20  # the largest child stands for all
    cells, rows = len(aggregation.cells), int(aggregation.cells["n"].sum())
    speed = f"{seconds:6.1f} s {1000 * seconds / cells:6.2f} ms/cell"
    print(f"{cells:>7,} cells {rows:>10,} rows {speed} {gigabytes:5.2f} GiB")


def main() -> None:
    """Parse the arguments, write the stores and measure each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=500, help="sample rows per cell")
    parser.add_argument("--folder", type=Path, help="where to write the stores (default: a temporary folder)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        if arguments.measure:
            measure(arguments.measure, Path(scratch))
            return
        for share in (0.25, 0.5, 1.0):
            experiment = write(Path(scratch) / f"{share}", int(arguments.cells * share), arguments.rows)
            subprocess.run([sys.executable, __file__, "--measure", str(experiment)], check=True)


if __name__ == "__main__":
    main()
