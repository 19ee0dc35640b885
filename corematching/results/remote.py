"""Results on an object store: ``results_dir=s3://bucket/folder`` (or ``gs://``, or whatever fsspec reaches).

A remote experiment has a *mirror*, a folder in this machine's cache that is a store like any other: claims, staging and
reading happen there. Finished cells are fetched into it when an experiment is opened, and uploaded from it as soon as
they are stored. So a connection that breaks costs no result: what could not be uploaded is uploaded by the same command
later.

On the remote side a cell is there exactly if its ``cell.json`` is, which is uploaded last and, to replace a cell, removed
first; its checksums say whether what lies there is whole. What is fetched is checked before it becomes part of the
mirror, so that neither a cut nor a changed object is believed, or replaces an intact cell here.

Claims are not shared through an object store. Machines that work on one remote experiment at once should each take a
``shard``; without, they may compute the same cell, and the last one to upload it stands.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from corematching import files
from corematching.files import cache_home
from corematching.errors import UserError
from corematching.results.manifest import FILE
from corematching.results.reading import RECORD, SAMPLES, UnusableCell, read_cell

WAITS = (0.5, 2.0, 8.0, 20.0)
"""Seconds between tries of whatever the network may refuse."""
_MARK, _INDEX = ".remote", ".fetched.json"
_OWN = ("cells", "claims", "staging", "workers", "wandb")
"""Folders of an experiment that are not uploaded as they are."""
_BATCH = 256
_PAUSE = 60.0
_Result = TypeVar("_Result")


def is_url(place: str | Path) -> bool:
    """Whether a place is on a remote store; ``file://`` is none."""
    return "://" in str(place) and not str(place).startswith("file://")


def local(place: str | Path) -> Path:
    """The folder for a place: that itself, or, of a URL, its mirror, with what is there fetched.

    Raises
    ------
    UserError
        If nothing here can read such URLs, or the store cannot be reached.
    """
    if not is_url(place):
        return Path(str(place).removeprefix("file://")).expanduser()
    url = str(place).rstrip("/")
    mirror = folder_of_mirrors(url.rpartition("/")[0]) / url.rpartition("/")[2]
    remote = Remote(url, mirror)
    if not (mirror / _MARK).is_file():
        files.write(mirror / _MARK, url + "\n")
    remote.fetch()
    return mirror


def folder_of_mirrors(results_dir: str) -> Path:
    """Where the mirrors of all experiments of a remote ``results_dir`` lie; a local one itself."""
    if not is_url(results_dir):
        return local(results_dir)
    url = results_dir.rstrip("/")
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    return cache_home() / "remote" / f"{re.sub(r'[^A-Za-z0-9]+', '-', url)[:60]}-{digest}"


def upload(folder: Path) -> None:
    """Upload a folder's tables and figures, and its cells, if it is a mirror; see `Remote.upload_all`."""
    if remote := of(folder):
        remote.upload_all()


def of(folder: Path) -> Remote | None:
    """What a folder is the mirror of, if of anything."""
    url = _url_of(folder)
    try:
        return Remote(url, folder) if url else None
    except (OSError, ValueError):  # nothing here reads such URLs: then the mirror is a folder like any other
        return None


def shown(folder: Path) -> str:
    """What to call a folder: its URL if it is a mirror."""
    return _url_of(folder) or str(folder)


def _url_of(folder: Path) -> str | None:
    """The URL that a mirror's mark names; nothing is connected for it."""
    try:
        return (folder / _MARK).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None


class Remote:
    """An experiment on a remote store, and its mirror.

    Parameters
    ----------
    url
        Of the experiment.
    mirror
        Its folder here.
    """

    def __init__(self, url: str, mirror: Path):
        self.url, self.mirror = url, mirror
        self.fs, self.root = _file_system(url)
        self._same = self._read_index()
        self._broken_until = 0.0

    def fetch(self) -> None:
        """Fetch the manifest and every intact cell that the mirror has not, or has otherwise.

        Raises
        ------
        UserError
            If the remote store cannot be read, or the mirror not be written.
        """
        listing = self._listing()
        there = {cell: version for cell, version in self._cells(listing).items() if self._same.get(cell) != version}
        wanted = list(there)
        for start in range(0, len(wanted), _BATCH):
            for cell in self._fetch_cells(wanted[start : start + _BATCH], listing):
                self._same[cell] = there[cell]
        if FILE in listing:
            content = self._try(lambda: self.fs.cat_file(f"{self.root}/{FILE}"))
            files.write(self.mirror / FILE, content)
        if wanted:
            self._write_index()

    def try_upload(self, cell: str) -> None:
        """Upload a cell if that works; after a failure, the next minute's cells are left for `upload_all`."""
        if time.monotonic() < self._broken_until:
            return
        try:
            self.upload_cell(cell)
        except UserError as error:
            warnings.warn(f"{error}; results stay in {self.mirror} and are uploaded later", stacklevel=2)
            self._broken_until = time.monotonic() + _PAUSE

    def upload_cell(self, cell: str) -> None:
        """Upload a cell of the mirror; it is visible there when it is complete.

        Raises
        ------
        UserError
            If the remote store refuses, or has something else afterwards.
        """
        here, there = self.mirror / "cells" / cell, f"{self.root}/cells/{cell}"

        def put() -> list[str]:
            versions = []
            with suppress(FileNotFoundError):
                self.fs.rm_file(f"{there}/{RECORD}")
            for name in (SAMPLES, RECORD):
                if (here / name).is_file():
                    content = (here / name).read_bytes()
                    self.fs.pipe_file(f"{there}/{name}", content)
                    self.fs.invalidate_cache()
                    facts = self.fs.info(f"{there}/{name}")
                    if facts["size"] != len(content):
                        raise OSError(f"{name} arrived cut")
                    versions.append(_version(facts))
            return versions[::-1]  # as they are listed: the record first

        self._same[cell] = _joined(self._try(put))

    def upload_all(self) -> None:
        """Upload the cells that are missing or damaged there, then tables, figures and whatever else shows them.

        Raises
        ------
        UserError
            If the remote store refuses.
        """
        present = self._cells(self._listing())
        for folder in sorted((self.mirror / "cells").iterdir()):
            cell = folder.name
            if self._same.get(cell) != present.get(cell, "nothing") and _record(folder) is not None:
                self.upload_cell(cell)
        for path in self._shown_files():
            name = path.relative_to(self.mirror).as_posix()
            content = path.read_bytes()
            self._try(partial(self.fs.pipe_file, f"{self.root}/{name}", content))
        self._write_index()

    def _shown_files(self) -> Iterator[Path]:
        for path in sorted(self.mirror.rglob("*")):
            parts = path.relative_to(self.mirror).parts
            if path.is_file() and parts[0] not in _OWN and not parts[-1].startswith("."):
                yield path

    def _fetch_cells(self, cells: list[str], listing: Mapping[str, Any]) -> list[str]:
        """Fetch cells beside the mirror's and take them over unless what is here is better; returns those taken."""
        scratch = self.mirror / "staging" / f"fetched-{secrets.token_hex(6)}"
        pairs = [
            (f"{self.root}/cells/{cell}/{name}", scratch / cell / name)
            for cell in cells
            for name in (RECORD, SAMPLES)
            if f"cells/{cell}/{name}" in listing
        ]
        try:
            for _, path in pairs:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._try(lambda: self.fs.get([source for source, _ in pairs], [str(path) for _, path in pairs]))
            return [cell for cell in cells if self._take(scratch / cell, self.mirror / "cells" / cell)]
        except OSError as error:
            raise UserError(
                f"cannot fetch {self.url} to '{self.mirror}' ({error.strerror or error}); free space, or set CM_CACHE "
                "to another folder"
            ) from error
        finally:
            with suppress(OSError):
                files.remove(scratch)

    @staticmethod
    def _take(fetched: Path, target: Path) -> bool:
        ours, theirs = _record(target), _record(fetched)
        if ours is not None and (theirs is None or (ours != theirs and _rank(ours) >= _rank(theirs))):
            return False
        with suppress(OSError):
            files.remove(target)  # damaged cells come, too: readers name them
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            fetched.rename(target)
        return True

    def _listing(self) -> dict[str, Mapping[str, Any]]:
        """What lies there, by path below the experiment."""

        def find() -> dict[str, Mapping[str, Any]]:
            self.fs.invalidate_cache()
            try:
                return self.fs.find(self.root, detail=True)
            except FileNotFoundError:
                return {}

        start = len(self.root.rstrip("/")) + 1
        return {path[start:]: facts for path, facts in self._try(find).items()}

    @staticmethod
    def _cells(listing: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """What tells the versions of each cell apart, of those that have a record."""
        parts: dict[str, list[str]] = {}
        for path in sorted(listing):
            if match := re.fullmatch(rf"cells/([^/]+)/(?:{re.escape(RECORD)}|{re.escape(SAMPLES)})", path):
                parts.setdefault(match[1], []).append(_version(listing[path]))
        return {cell: _joined(found) for cell, found in parts.items() if f"cells/{cell}/{RECORD}" in listing}

    def _read_index(self) -> dict[str, str]:
        """Versions of the remote cells that the mirror's are the same as."""
        try:
            found = json.loads((self.mirror / _INDEX).read_text(encoding="utf-8"))
            known = {str(cell): str(version) for cell, version in found.items()}
        except (OSError, ValueError, AttributeError, RecursionError):
            return {}
        return {cell: version for cell, version in known.items() if (self.mirror / "cells" / cell / RECORD).is_file()}

    def _write_index(self) -> None:
        files.write(self.mirror / _INDEX, json.dumps(self._same))

    def _try(self, action: Callable[[], _Result]) -> _Result:
        """Do something that the network may refuse, several times if need be."""
        for wait in (*WAITS, None):
            try:
                return action()
            except Exception as error:  # every file system has exceptions of its own
                if wait is None or isinstance(error, PermissionError | UserError):
                    reason = " ".join(str(error).split())[:200] or type(error).__name__
                    raise UserError(f"{self.url} cannot be used ({reason})") from error
            time.sleep(wait)
        raise AssertionError("unreachable")


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path on it."""
    scheme = url.partition("://")[0]
    try:
        import fsspec

        file_system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = "pip install 'corematching-bench[s3]'" if scheme in ("s3", "s3a") else f"install {_package(error)}"
        raise UserError(f"results_dir={url} needs a package that is not installed: {extra}") from None
    except ValueError as error:
        raise UserError(f"results_dir={url} is not valid ({error}); give a folder, or a URL such as s3://bucket/folder") from None
    return file_system, path.rstrip("/")


def _package(error: ImportError) -> str:
    words = str(error).split()
    return "gcsfs" if "gcsfs" in words else str(error)


def _version(facts: Mapping[str, Any]) -> str:
    """What changes when an object does."""
    names = ("ETag", "etag", "generation", "md5Hash", "created", "mtime", "LastModified")
    return f"{facts.get('size')}:{next((facts[name] for name in names if facts.get(name)), '')}"


def _joined(versions: Sequence[str]) -> str:
    """The version of a cell, from those of its record and its rows."""
    return " ".join(versions)


def _rank(record: Mapping[str, Any]) -> tuple[int, str]:
    """Of two records of a cell, the one to keep has the higher rank: the better status, then the later one."""
    return ("failed", "not_scored", "done").index(record["status"]), record["provenance"].get("finished") or ""


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        return read_cell(folder)
    except UnusableCell:
        return None
