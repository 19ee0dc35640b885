"""One cell: claim it, compute it, store what came out, be it a result or a failure."""

import time
from datetime import UTC, datetime
from typing import Any

from corematching.evaluation.cells import Cell
from corematching.evaluation.experiment import Experiment
from corematching.evaluation.progress import Reporter
from corematching.evaluation.records import describe, new_record
from corematching.results.store import Store


def attempt(
    cell: Cell, experiment: Experiment, evaluator: Any, store: Store, reporter: Reporter
) -> dict[str, Any] | None:
    """Compute one cell and store it, failure included; None if another process is at it."""
    with store.claim(cell.id) as mine:
        if not mine:
            return None
        record = store.read(cell.id)
        if record is not None and finished(record, experiment):
            reporter.skip(cell, "done by another process")
            return record
        reporter.start(cell)
        started, clock = datetime.now(UTC), time.perf_counter()
        samples = None
        try:
            result, samples = evaluator.evaluate(cell, reporter.advance)
        except Exception as error:  # whatever went wrong belongs to this cell, and the sweep goes on
            result = {"status": "failed", "error": describe(error)}
        record = new_record(cell, "accuracy", started, time.perf_counter() - clock, result)
        store.write(record, samples)
        reporter.finish(cell, record)
        return record


def finished(record: dict[str, Any] | None, experiment: Experiment) -> bool:
    """Whether a cell needs no more work. Failed cells are tried again; unscored ones too if there is a judge now."""
    if record is None or record["status"] == "failed":
        return False
    if experiment.since and begun(record) < experiment.since:
        return False
    return record["status"] == "done" or experiment.settings["judge"]["name"] == "none"


def begun(record: dict[str, Any]) -> float:
    """When work on a stored cell began, in seconds since 1970; 0 if the record does not say."""
    try:
        return datetime.fromisoformat(record["provenance"]["started"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return 0.0
