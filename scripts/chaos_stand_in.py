"""Stands in for `corematching.evaluation.evaluator` in scripts/chaos.py: a moment per batch, answers made of hashes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

BATCHES, SECONDS = 4, 0.08


class Evaluator:
    """Answers without a model; see `corematching.evaluation.evaluator.Evaluator`."""

    company: tuple = ()
    offer: Any = None

    def __init__(self, experiment: Any):
        self.experiment = experiment

    def check_methods(self, cells: Sequence[Any]) -> None:
        """Everything fits."""

    def prepare(self) -> None:
        """Nothing is loaded."""

    def answered(self, cell: Any) -> bool:
        """No cells are answered together."""
        return False

    def help(self, company: Sequence[Any], offer: Any) -> int:
        """Nothing is shared."""
        return 0

    def evaluate(self, cell: Any, on_progress: Callable[[int, int], None]) -> tuple[dict[str, Any], pd.DataFrame]:
        """A record that depends on the cell alone."""
        for batch in range(1, BATCHES + 1):
            time.sleep(SECONDS)
            on_progress(batch, BATCHES)
        rows = range(cell.config["benchmark"]["limit"])
        scores = [float(hashlib.sha256(f"{cell.id} {row}".encode()).digest()[0] % 2) for row in rows]
        value = 100 * sum(scores) / len(scores)
        trace = {"visual_tokens_per_layer": 64.0, "kv_bytes": 1e6, "flops": {"prefill": 1e9, "total": 2e9}}
        record = {
            "status": "done",
            "score": {"metric": "accuracy", "value": value, "scale": 100.0, "note": ""},
            "metrics": {"accuracy": value},
            "n": len(scores),
            "trace": trace,
            "timing": {"model_seconds": 0.0},
        }
        samples = pd.DataFrame({"doc_id": list(rows), "part": "", "unit": list(map(str, rows)), "score": scores})
        return record, samples


def build(cell: Any) -> Any:
    """No method is needed."""
    return None
