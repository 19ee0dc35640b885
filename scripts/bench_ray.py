"""What Ray costs and how it scales: the same sweep on one process, and on 1, 2 and 4 Ray workers of one thread each.

    python scripts/bench_ray.py [--questions 24] [--workers 1 2 4]

*Overhead per cell*: with one worker, the time from one stored cell to the next, less the seconds that the second one
took by its own record; median. *Throughput*: cells per second from the moment when every worker has stored its first
cell until the first worker is without work. *Efficiency*: throughput over that of one worker times the workers. Sample
rows and tables must be byte for byte the same everywhere. Exit status: 0 they are, 1 they are not.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"

SWEEP = ["methods=[dense,random,uniform,fastv,corematching]", "keep=[256,192,128,64,32]", "benchmarks=[gqa]"]
USUAL = ["data=mini", "model=tiny", "tracking=none", "report=false", "name=run", "together=1", "model.device=cpu"]


def run(folder: Path, questions: int, *words: str) -> None:
    """Run the sweep in this process, quietly."""
    from corematching import cli

    words = (*SWEEP, *USUAL, f"limit={questions}", f"data.n={2 * questions}", f"results_dir={folder}", *words)
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        shown, sys.stdout = sys.stdout, log
        try:
            status = cli.main(words)
        finally:
            sys.stdout = shown
    if status:
        sys.exit((folder.parent / f"{folder.name}.log").read_text())


def on_ray(folder: Path, questions: int, workers: int) -> list[tuple[float, int, float, bool]]:
    """Of each stored cell: when, by which worker, the seconds of its record, and whether there was work left."""
    import ray

    from corematching.evaluation import on_ray as module

    events = []

    class Watched(module.Fleet):
        def _store(self, seat: Any, found: Any) -> None:
            super()._store(seat, found)
            for _, record, _ in found or ():
                events.append((time.perf_counter(), seat.number, record["timing"]["seconds"], bool(self._queue)))

    kept, module.Fleet = module.Fleet, Watched
    try:
        ray.init(
            num_cpus=workers,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            object_store_memory=200 * 2**20,
        )
        run(folder, questions, "executor=ray", f"executor.workers={workers}")
    finally:
        module.Fleet = kept
        ray.shutdown()
    return events


def throughput(events: list[tuple[float, int, float, bool]], workers: int) -> float:
    """Cells per second while all workers were at work and warm."""
    first: dict[int, float] = {}
    for when, worker, _, _ in events:
        first.setdefault(worker, when)
    begin = max(first.values())
    end = min(when for when, _, _, left in events if not left and when > begin)
    return sum(begin < when <= end for when, _, _, _ in events) / (end - begin)


def contents(folder: Path) -> dict[str, bytes]:
    """Tables and sample rows."""
    paths = [*folder.glob("run/cells/*/samples.parquet"), *folder.glob("run/table.*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def main() -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("CM_CACHE", f"{scratch}/cache")
        whole = Path(scratch) / "local"
        run(whole, chosen.questions)
        expected, alone, same = contents(whole), None, True
        for workers in chosen.workers:
            folder = Path(scratch) / f"ray{workers}"
            events = on_ray(folder, chosen.questions, workers)
            same &= contents(folder) == expected
            rate = throughput(events, workers)
            told = f"{workers} workers: {rate:.3f} cells/s"
            if workers == 1:
                alone = rate
                waits = [after[0] - before[0] - after[2] for before, after in pairwise(events)]
                cell = 1000 * median(waits)
                told += f", overhead {cell:.0f} ms per cell, {cell / chosen.questions:.2f} ms per question"
            elif alone:
                told += f", efficiency {100 * rate / alone / workers:.0f} %"
            print(told, flush=True)
        print(f"{len(expected)} files are {'the same' if same else 'NOT the same'} everywhere")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
