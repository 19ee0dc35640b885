"""What every cell's record holds, whichever road it came by; `corematching.results.record` is its schema."""

import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from corematching.evaluation import provenance
from corematching.evaluation.cells import Cell


def new_record(
    cell: Cell, kind: str, started: datetime, seconds: float, result: Mapping[str, Any], **origin: Any
) -> dict[str, Any]:
    """The record of a cell that has just finished or failed.

    Parameters
    ----------
    kind
        "accuracy" or "efficiency".
    started, seconds
        When work on the cell began, and how long it took.
    result
        What the work adds: ``status``, and any of score, metrics, n, trace, timing, error, bench.
    **origin
        Further entries of ``provenance``, or replacements for them.
    """
    return {
        "kind": kind,
        "id": cell.id,
        "config": cell.config,
        "labels": cell.label,
        "metrics": {},
        "score": None,
        "n": 0,
        "trace": None,
        "error": None,
        "bench": None,
        **result,
        "timing": {**result.get("timing", {}), "seconds": seconds},
        "provenance": {
            "versions": provenance.versions(),
            "git_commit": provenance.git_commit(),
            "hardware": provenance.hardware(),
            "started": started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            **origin,
        },
    }


def describe(error: Exception) -> dict[str, str]:
    """An exception as a record keeps it."""
    return {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
