"""What ties a stored cell together: its name is the hash of its configuration, checksums cover everything else.

A record holds ``checksums``: ``samples``, the SHA-256 of ``samples.parquet`` (None without one), and ``record``, that of
the record's own canonical JSON with all but this field. So no value, label or row can change, and no file be exchanged
for another cell's, without being noticed. It guards against damage and careless edits, not against forgery.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text.

    Raises
    ------
    TypeError, ValueError
        If `value` holds something JSON cannot say (objects, NaN).
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def identity(canonical: str) -> str:
    """Name of a cell: first 16 hex digits of the SHA-256 of its configuration's canonical JSON."""
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def sealed(record: Mapping[str, Any], samples: str | None) -> dict[str, Any]:
    """`record` with its checksums, given that of its sample rows."""
    record = {**record, "checksums": {"samples": samples}}
    return {**record, "checksums": {"samples": samples, "record": _digest(record)}}


def is_sealed(record: Mapping[str, Any]) -> bool:
    """Whether `record` is, value for value, what its checksum was made of."""
    checksums = dict(record["checksums"])
    said = checksums.pop("record", None)
    return said == _digest({**record, "checksums": checksums})


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(record).encode()).hexdigest()
