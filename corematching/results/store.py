"""The results store: one folder per finished cell, published in one rename.

Layout, below ``<results_dir>/<experiment>/``::

    cells/<cell id>/cell.json        configuration, metrics, trace summary, timing, provenance, status
    cells/<cell id>/samples.parquet  one row per question
    claims/<cell id>.lock            held (flock) while a process computes the cell
    staging/                         cells being written; whatever lies here is not a result

A reader never sees half a cell: both files are written and synced in ``staging`` and the folder is then renamed. A
process that dies releases its claims with it, because the kernel drops its locks.
"""

import fcntl
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corematching.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
STATUSES = ("done", "failed", "not_scored")


class UnreadableCellWarning(UserWarning):
    """A folder below ``cells/`` that is not a readable cell; it is left alone and skipped."""


class Store:
    """Cells of one experiment on disk.

    Parameters
    ----------
    root
        ``<results_dir>/<experiment>``; created when missing.

    Raises
    ------
    UserError
        If the folder cannot be created or written.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        try:
            for folder in (self.cells, self.root / "claims", self.root / "staging"):
                folder.mkdir(parents=True, exist_ok=True)
            probe = self.root / "staging" / f".probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
            next(self.cells.iterdir(), None)
        except OSError as error:
            raise UserError(
                f"cannot write results to '{self.root}' ({error.strerror}); choose another folder with results_dir=PATH"
            ) from error

    @property
    def cells(self) -> Path:
        """Folder that holds the finished cells."""
        return self.root / "cells"

    def read(self, cell_id: str) -> dict[str, Any] | None:
        """The cell's record, or None when it is missing or unreadable (the latter with a warning)."""
        folder = self.cells / cell_id
        try:
            record = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            if folder.exists():
                _warn(folder, "cell.json is missing")
            return None
        except (OSError, ValueError) as error:
            _warn(folder, f"cell.json is unreadable: {error}")
            return None
        problem = _problem(record, cell_id)
        if problem:
            _warn(folder, problem)
            return None
        return record

    def records(self) -> Iterator[dict[str, Any]]:
        """Every readable record, ordered by cell id."""
        for folder in sorted(self.cells.iterdir()):
            if folder.is_dir() and (record := self.read(folder.name)) is not None:
                yield record

    def samples(self, cell_id: str) -> "pd.DataFrame":
        """The cell's rows, one per question."""
        import pandas as pd

        return pd.read_parquet(self.cells / cell_id / "samples.parquet")

    def write(self, record: dict[str, Any], samples: "pd.DataFrame | None" = None) -> Path:
        """Publish a cell. A cell that is already there (a failed one, tried again) is replaced.

        Returns
        -------
        Path
            The cell's folder.

        Raises
        ------
        ValueError
            If the record lacks what every reader relies on.
        UserError
            If the disk does not take it; nothing half-written is left among the cells.
        """
        record = plain(record)
        problem = _problem(record, record.get("id"))
        if problem:
            raise ValueError(f"not a cell record: {problem}")
        try:
            return self._publish(record, samples)
        except OSError as error:
            raise UserError(
                f"cannot store a cell in '{self.root}' ({error.strerror or error}); finished cells are safe, "
                "run the same command again to resume"
            ) from error

    def _publish(self, record: dict[str, Any], samples: "pd.DataFrame | None") -> Path:
        target = self.cells / record["id"]
        staged = self.root / "staging" / f"{record['id']}-{os.getpid()}"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        (staged / "cell.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        if samples is not None:
            samples.to_parquet(staged / "samples.parquet", index=False)
        for path in (*staged.iterdir(), staged):
            _sync(path)
        superseded = staged.with_name(staged.name + "-old")
        with suppress(FileNotFoundError):
            target.rename(superseded)
        staged.rename(target)
        _sync(self.cells)
        shutil.rmtree(superseded, ignore_errors=True)
        return target

    @contextmanager
    def claim(self, cell_id: str) -> Iterator[bool]:
        """Try to reserve a cell for this process; yields whether that worked.

        The claim is an ``flock``, so it ends with the process however that ends. On file systems without locks the
        claim is granted with a warning: two processes may then compute the same cell, and the last one wins.
        """
        path = self.root / "claims" / f"{cell_id}.lock"
        descriptor = _try_lock(path)
        if descriptor is None:
            yield False
            return
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.uname().nodename} {os.getpid()}\n".encode())
            for leftover in (self.root / "staging").glob(f"{cell_id}-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield True
        finally:
            with suppress(FileNotFoundError):
                path.unlink()
            os.close(descriptor)


def plain(value: Any) -> Any:
    """`value` with only JSON types: numpy scalars unwrapped, tuples as lists, NaN and infinities as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item") and callable(value.item):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def _try_lock(path: Path) -> int | None:
    """An open descriptor that holds the lock on `path`, or None when another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            warnings.warn(f"no file locks on {path.parent} ({error.strerror}): run one process at a time", stacklevel=3)
            return descriptor
        # Whoever held the lock before may have removed the file between our open and our lock; then try the new one.
        try:
            same = os.path.samestat(os.stat(path), os.fstat(descriptor))
        except FileNotFoundError:
            same = False
        if same:
            return descriptor
        os.close(descriptor)


def _problem(record: Any, cell_id: str | None) -> str | None:
    """Why `record` is not the record of `cell_id`, or None."""
    if not isinstance(record, dict):
        return "cell.json does not hold an object"
    if record.get("schema") != SCHEMA:
        return f"schema {record.get('schema')!r} is not {SCHEMA}"
    if not record.get("id") or record["id"] != cell_id:
        return f"its id {record.get('id')!r} is not its folder's name"
    if record.get("status") not in STATUSES:
        return f"status {record.get('status')!r} is none of {', '.join(STATUSES)}"
    if not isinstance(record.get("config"), dict) or not isinstance(record.get("labels"), dict):
        return "config or labels are missing"
    return None


def _warn(folder: Path, why: str) -> None:
    warnings.warn(f"skipping cell {folder}: {why}", UnreadableCellWarning, stacklevel=3)


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
