"""The results store: one folder per finished cell, published in one rename.

Layout, below ``<results_dir>/<experiment>/``::

    cells/<cell id>/cell.json        configuration, metrics, trace summary, timing, provenance, status, checksums
    cells/<cell id>/samples.parquet  one row per question
    claims/<cell id>.<n>.lease       held while a process computes the cell (`corematching.results.claims`)
    staging/                         cells being written; whatever lies here is not a result

A reader never sees half a cell: both files are written and synced in ``staging`` and the folder is then renamed. Nor
does it see a changed one (`corematching.results.seal`). Two processes that write the same cell both get on: each has staging
folders of its own, and one cell replaces the other whole.
"""

import errno
import json
import math
import os
import secrets
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corematching.errors import UserError
from corematching.files import remove, sync
from corematching.results import record as schema
from corematching.results import remote, seal
from corematching.results.claims import Claims, Holder
from corematching.results.reading import RECORD, SAMPLES, SCHEMA, UnusableCell, digest, read_cell

if TYPE_CHECKING:
    import pandas as pd

_REPLACED = "-replaced"
_TRIES = 5
"""To publish a cell that several processes write at once; each try fails only if another one's succeeded meanwhile."""


class UnreadableCellWarning(UserWarning):
    """A folder below ``cells/`` that is not an intact cell; it is left alone, skipped, and computed again if needed."""


class Store:
    """Cells of one experiment on disk.

    Parameters
    ----------
    root
        ``<results_dir>/<experiment>``; created when missing. Where it mirrors a remote store
        (`corematching.results.remote`), cells are uploaded when they are stored.

    Raises
    ------
    UserError
        If the folder cannot be created or written.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self._claims = Claims(self.root / "claims")
        self.remote = remote.of(self.root)
        try:
            for folder in (self.cells, self.root / "claims", self._staging):
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._staging):
                pass
            next(self.cells.iterdir(), None)
        except OSError as error:
            raise UserError(
                f"cannot write results to '{self.root}' ({error.strerror}); choose another folder with results_dir=PATH"
            ) from error

    @property
    def cells(self) -> Path:
        """Folder that holds the finished cells."""
        return self.root / "cells"

    @property
    def _staging(self) -> Path:
        return self.root / "staging"

    def read(self, cell_id: str) -> dict[str, Any] | None:
        """The cell's record, or None when it is missing or not intact (the latter with a warning)."""
        folder = self.cells / cell_id
        if not os.path.lexists(folder):
            return None
        try:
            return read_cell(folder)
        except UnusableCell as reason:
            warnings.warn(f"skipping cell {folder}: {reason}", UnreadableCellWarning, stacklevel=2)
            return None

    def records(self) -> Iterator[dict[str, Any]]:
        """Every intact record, ordered by cell id."""
        for folder in sorted(self.cells.iterdir()):
            if folder.is_dir() and (record := self.read(folder.name)) is not None:
                yield record

    def samples(self, cell_id: str) -> "pd.DataFrame":
        """The rows of an intact cell, one per question."""
        import pandas as pd

        return pd.read_parquet(self.cells / cell_id / SAMPLES)

    def write(self, record: Mapping[str, Any], samples: "pd.DataFrame | None" = None) -> Path:
        """Publish a cell, with its schema number and checksums.

        A cell that is already there (a failed one, tried again; a damaged one) is replaced, unless it says the same.

        Returns
        -------
        Path
            The cell's folder.

        Raises
        ------
        ValueError
            If the record lacks what every reader relies on, or its id is not that of its configuration.
        UserError
            If the disk does not take it; nothing half-written is left among the cells.
        """
        record = {**plain(record), "schema": SCHEMA}
        reason = schema.problem(record)
        if not reason and seal.identity(seal.canonical_json(record["config"])) != record["id"]:
            reason = f"{record['id']} is not the id of its configuration"
        if reason:
            raise ValueError(f"not a cell record: {reason}")
        try:
            folder = self._write_staged(record, samples)
        except OSError as error:
            raise UserError(
                f"cannot store a cell in '{self.root}' ({error.strerror or error}); finished cells are safe, "
                "run the same command again to resume"
            ) from error
        if self.remote:
            self.remote.try_upload(record["id"])
        return folder

    def refresh(self) -> None:
        """Fetch what others have stored remotely, if this store mirrors a remote one.

        Raises
        ------
        UserError
            If the remote store cannot be read.
        """
        if self.remote:
            self.remote.fetch()

    def upload(self) -> None:
        """See to it that all of this store is on the remote one, if it mirrors one.

        Raises
        ------
        UserError
            If the remote store does not take it; the same command tries again.
        """
        if self.remote:
            try:
                self.remote.upload_all()
            except UserError as error:
                raise UserError(f"{error}; all results are in {self.root}, and the same command uploads the rest") from None

    def _write_staged(self, record: dict[str, Any], samples: "pd.DataFrame | None", again: bool = True) -> Path:
        # No two writers share a name, not even on two machines.
        staged = self._staging / f"{record['id']}-{os.getpid()}-{secrets.token_hex(6)}"
        try:
            staged.mkdir()
            return self._publish(self._stage(staged, record, samples), staged)
        except OSError:
            if not again or staged.is_dir():
                raise
        finally:
            with suppress(OSError):
                remove(staged)
        # We stood still so long that another process took the cell over and cleared up after us.
        return self._write_staged(record, samples, again=False)

    def _stage(self, staged: Path, record: dict[str, Any], samples: "pd.DataFrame | None") -> dict[str, Any]:
        """Write and sync a cell's files; returns the record as written."""
        if samples is not None:
            samples.to_parquet(staged / SAMPLES, index=False)
        record = seal.sealed(record, None if samples is None else digest(staged / SAMPLES))
        (staged / RECORD).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        for path in (*staged.iterdir(), staged):
            sync(path)
        return record

    def _publish(self, record: dict[str, Any], staged: Path) -> Path:
        """Rename a staged cell to its place, whatever stands there and however many others do the same."""
        target = self.cells / record["id"]
        replaced = staged.with_name(staged.name + _REPLACED)
        for _ in range(_TRIES):
            if record["status"] == "done" and _same(target, record):
                return target
            with suppress(FileNotFoundError):
                target.rename(replaced)
            try:
                staged.rename(target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    self._restore(replaced, target)
                    raise
            else:
                sync(self.cells)
                with suppress(OSError):
                    remove(replaced)
                return target
            with suppress(OSError):
                remove(replaced)
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    @contextmanager
    def claim(self, cell_id: str) -> Iterator[bool]:
        """Try to reserve a cell for this process; yields whether that worked. See `corematching.results.claims`.

        Raises
        ------
        UserError
            If the claim cannot be written.
        """
        with self._claims.claim(cell_id) as mine:
            if mine:  # then whatever is staged for this cell is a dead process's
                self._clear(cell_id)
            yield mine

    def holder(self, cell_id: str) -> Holder | None:
        """Who computes a cell now, as far as is known."""
        return self._claims.holder(cell_id)

    def _clear(self, cell_id: str) -> None:
        for leftover in self._staging.glob(f"{cell_id}-*"):
            with suppress(OSError):
                if leftover.name.endswith(_REPLACED):
                    self._restore(leftover, self.cells / cell_id)
                remove(leftover)

    @staticmethod
    def _restore(replaced: Path, target: Path) -> None:
        """Put back a cell that was taken out of its place by a replacement that did not come."""
        with suppress(OSError):
            if not os.path.lexists(target):
                replaced.rename(target)


def plain(value: Any) -> Any:
    """`value` with only JSON types: numpy scalars unwrapped, tuples as lists, NaN and infinities as None.

    Halves of surrogate pairs, which no file can hold, are escaped.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item") and callable(value.item):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def _same(folder: Path, record: dict[str, Any]) -> bool:
    """Whether the cell in `folder` says what `record` says, but for when and where it was computed."""
    try:
        there = read_cell(folder)
    except UnusableCell:
        return False
    apart = ("timing", "provenance")
    told, own = ({**one, "checksums": one["checksums"]["samples"]} for one in (there, record))
    return {k: v for k, v in told.items() if k not in apart} == {k: v for k, v in own.items() if k not in apart}
