"""Read a cell's folder, whatever lies in it: a record that can be relied on, or the reason why there is none."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

from corematching.results import record as schema
from corematching.results import seal

SCHEMA = 2
"""Of ``cell.json``. Cells of another schema are computed again."""
RECORD, SAMPLES = "cell.json", "samples.parquet"


class UnusableCell(Exception):
    """A folder that is no intact cell; the message says why in one line."""


def read_cell(folder: Path) -> dict[str, Any]:
    """The record of the cell in `folder`, checked against its schema, its name and its checksums.

    The sample rows are checked too (their bytes, not their meaning), so that whatever is shown of a cell later is what
    was stored.

    Raises
    ------
    UnusableCell
        If anything is missing, damaged, edited, malformed or of another cell.
    """
    try:
        record = _parse(folder)
        _check(record, folder)
    except RecursionError:
        raise UnusableCell(f"{RECORD} is nested too deeply") from None
    _check_samples(folder / SAMPLES, record["checksums"]["samples"])
    return record


def digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def one_line(error: Exception) -> str:
    """An exception's message, short enough to stand in a warning."""
    return " ".join(str(error).split())[:160]


def _parse(folder: Path) -> Any:
    try:
        with _open(folder / RECORD) as file:
            return json.loads(file.read().decode("utf-8"), parse_constant=_refuse)
    except FileNotFoundError:
        raise UnusableCell(f"no {RECORD} (it is missing, or this is another kind of folder)") from None
    except (OSError, ValueError) as error:
        raise UnusableCell(f"{RECORD} cannot be read ({one_line(error)})") from None


def _check(record: Any, folder: Path) -> None:
    """Refuse what is not, value for value, the record of the cell that the folder is named for."""
    if not isinstance(record, dict):
        raise UnusableCell(f"{RECORD} is not an object")
    if record.get("schema") != SCHEMA:
        raise UnusableCell(f"{RECORD} has schema {record.get('schema')!r:.40}, expected {SCHEMA}")
    if record.get("id") != folder.name:
        raise UnusableCell(f"{RECORD} is of cell {record.get('id')!r:.40}")
    try:
        intact = isinstance(record.get("checksums"), dict) and seal.is_sealed(record)
        own = seal.identity(seal.canonical_json(record.get("config")))
    except (TypeError, ValueError) as error:
        raise UnusableCell(f"{RECORD} holds what no cell does ({one_line(error)})") from None
    if not intact:
        raise UnusableCell(f"{RECORD} was changed: its checksum is another")
    if own != record["id"]:
        raise UnusableCell(f"its configuration is that of cell {own}")
    if reason := schema.problem(record):
        raise UnusableCell(f"{RECORD} is malformed ({reason})")


def _check_samples(path: Path, expected: Any) -> None:
    """Compare the rows' checksum; a cell that was stored without rows has none."""
    try:
        found = digest(path)
    except FileNotFoundError:
        found = None
    except OSError as error:
        raise UnusableCell(f"{SAMPLES} cannot be read ({one_line(error)})") from None
    if found != expected:
        what = "is missing" if found is None else "was changed or is of another cell: its checksum is another"
        raise UnusableCell(f"{SAMPLES} {what}")


def _open(path: Path) -> io.BufferedReader:
    """Open a regular file to read; a pipe or device in its place would block or never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path.name} is no regular file")
    return os.fdopen(descriptor, "rb")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
