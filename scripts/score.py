"""Score saved answers that had no score yet.

    python scripts/score.py results/table1 --judge openai        grade MM-Vet's answers
    python scripts/score.py results/test --submission uploads    write the files that test servers score

The model is not run again: everything needed is in the cells. Run the experiment once more afterwards to rewrite its
table. A judge that fails leaves the cell not scored, with the grades that did come.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd

from corematching import files
from corematching.benchmarks import Benchmark, Judge, load_benchmark, load_judge
from corematching.benchmarks.judge import mmvet_prompt
from corematching.benchmarks.scoring import value_from_samples
from corematching.errors import UserError
from corematching.results import remote
from corematching.results.store import Store


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 if a cell is still not scored, 2 for wrong input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="folder of one experiment's results, or its URL")
    parser.add_argument("--judge", default="none", help="openai, local or none (default)")
    parser.add_argument("--submission", type=Path, metavar="FOLDER", help="write files for test servers here")
    args = parser.parse_args(argv)
    judge = None
    try:
        folder = remote.local(args.experiment)
        if not (folder / "cells").is_dir():
            raise UserError(f"no results in {args.experiment}: it has no folder called cells")
        judge = load_judge(args.judge)
        return _score_all(Store(folder), judge, args.submission)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if judge is not None:
            judge.close()


def _score_all(store: Store, judge: Judge | None, submission: Path | None) -> int:
    open_cells = [record for record in store.records() if record["status"] == "not_scored"]
    left = 0
    for record in open_cells:
        benchmark = load_benchmark(record["config"]["benchmark"]["name"])
        name = f"{benchmark.name} {record['labels'].get('method')} {record['id']}"
        if benchmark.needs_judge and judge is not None:
            left += not _grade(store, record, benchmark, judge, name)
        elif benchmark.needs_server and submission is not None:
            print(f"{name}: wrote {_write_submission(store, record, benchmark, submission)}")
        else:
            left += 1
            print(f"{name}: still not scored, it needs {'--judge' if benchmark.needs_judge else '--submission'}")
    if not open_cells:
        print("every cell is scored")
    return int(left > 0)


def _grade(store: Store, record: dict[str, Any], benchmark: Benchmark, judge: Judge, name: str) -> bool:
    """Grade the rows that have no grade; returns whether the cell is scored now."""
    from corematching.benchmarks.tasks import mmvet_instructions  # imports lmms-eval, for its instructions to the judge

    instructions = mmvet_instructions()
    samples = store.samples(record["id"])
    missing = samples[samples["score"].isna()]
    prompts = [
        mmvet_prompt(instructions, row.question, row.target, row.prediction) for row in missing.itertuples(index=False)
    ]
    with ThreadPoolExecutor(4) as pool:
        grades = list(pool.map(judge.grade, prompts))
    samples.loc[missing.index, "score"] = pd.Series([grade.score for grade in grades], missing.index, dtype="float64")
    value, metrics = value_from_samples(benchmark, samples)
    failed = [grade.reason for grade in grades if grade.score is None]
    note = f"{len(failed)} of {len(samples)} answers not graded: {failed[0]}" if failed else judge.note
    record["score"] |= {"value": value, "note": note}
    record["metrics"] |= metrics
    record["status"] = "not_scored" if value is None else "done"
    store.write(record, samples)
    print(f"{name}: {'still not scored' if value is None else f'{value:.1f}'} ({note})")
    return value is not None


def _write_submission(store: Store, record: dict[str, Any], benchmark: Benchmark, folder: Path) -> Path:
    samples = store.samples(record["id"])
    answers = [
        {"question_id": int(row.question_id), "answer": row.submission} for row in samples.itertuples(index=False)
    ]
    name = f"{benchmark.name}_{record['config']['method']['name']}_{record['id']}.json"
    return files.write(folder / name, json.dumps(answers))


if __name__ == "__main__":
    sys.exit(main())
