"""What the harness costs around the model: building the tasks, and milliseconds per question.

    python scripts/bench_harness.py [--n 300] [--json FILE]

A model that answers at once takes the place of the real one. Its own time, which includes reading the images, is shown
apart and is not part of the overhead. Data generation and imports are shown as well, because a user waits for them too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from corematching import files
from corematching.benchmarks import BENCHMARKS, load_benchmark, load_judge, load_source

BUILD_LIMIT = 8.0  # seconds for the ten
SAMPLE_LIMIT = 3.0  # milliseconds per question, on average


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=300, help="questions per benchmark (default 300)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    args = parser.parse_args(argv)
    numbers = measure(args.n)
    for name, row in numbers["benchmarks"].items():
        print(
            f"{name:10} build {row['build_s']:5.2f} s   overhead {row['overhead_ms']:5.2f} ms/question"
            f"   reading images {row['reading_ms']:5.2f} ms/question"
        )
    print(f"making the data {numbers['data_s']:.1f} s (once), importing lmms-eval {numbers['import_s']:.1f} s")
    print(f"building ten benchmarks {numbers['build_s']:.2f} s (limit {BUILD_LIMIT:.0f})")
    print(f"overhead {numbers['overhead_ms']:.2f} ms/question (limit {SAMPLE_LIMIT:.0f})")
    if args.json:
        files.write(args.json, json.dumps(numbers, indent=1) + "\n")
    return int(numbers["build_s"] > BUILD_LIMIT or numbers["overhead_ms"] > SAMPLE_LIMIT)


def measure(n: int) -> dict[str, Any]:
    """Run all ten benchmarks on `n` questions each; see the module's text for what is counted."""
    source = load_source("mini", n=n)
    clock = time.perf_counter
    start = clock()
    for name in BENCHMARKS:
        source.root(load_benchmark(name))
    numbers: dict[str, Any] = {"n": n, "data_s": clock() - start, "benchmarks": {}}
    start = clock()
    from corematching.benchmarks.scoring import score
    from corematching.benchmarks.tasks import build_tasks
    from corematching.evaluation.harness import evaluate

    numbers["import_s"] = clock() - start
    judge = load_judge("local")
    tasks = {}
    for name in BENCHMARKS:
        start = clock()
        tasks[name] = build_tasks(load_benchmark(name), source, judge=judge)
        numbers["benchmarks"][name] = {"build_s": clock() - start}
    for name in BENCHMARKS:
        model = _instant_model()
        start = clock()
        samples = score(load_benchmark(name), evaluate(model, tasks[name])).samples
        spent = clock() - start - model.seconds
        row = {"questions": len(samples), "overhead_ms": 1e3 * spent / len(samples)}
        numbers["benchmarks"][name] |= row | {"reading_ms": 1e3 * model.seconds / len(samples)}
    if judge is not None:
        judge.close()
    rows = numbers["benchmarks"].values()
    numbers["build_s"] = sum(row["build_s"] for row in rows)
    questions = sum(row["questions"] for row in rows)
    numbers["overhead_ms"] = sum(row["overhead_ms"] * row["questions"] for row in rows) / questions
    return numbers


def _instant_model() -> Any:
    from lmms_eval.api.model import lmms

    class Instant(lmms):
        is_simple = True
        seconds = 0.0

        def generate_until(self, requests: list) -> list[str]:
            start = time.perf_counter()
            for request in requests:
                _, _, to_images, row, task, split = request.args
                to_images(self.task_dict[task][split][row])
            self.seconds += time.perf_counter() - start
            return ["yes"] * len(requests)

        def loglikelihood(self, requests: list) -> list:
            raise NotImplementedError

        def generate_until_multi_round(self, requests: list) -> list:
            raise NotImplementedError

        def clean(self) -> None:
            """Keep lmms-eval from spending half a second on collecting garbage."""

    return Instant()


if __name__ == "__main__":
    sys.exit(main())
