"""Parquet files of the mini suite: feature types, images, checksums, and folders that appear complete or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from corematching.errors import UserError
from corematching.files import remove

MANIFEST = "manifest.json"

Row = dict[str, Any]
#: Relative path of a parquet file -> (feature types, rows).
Files = dict[str, tuple[dict[str, Any], list[Row]]]


def intact(folder: Path) -> bool:
    """Whether the folder holds exactly the files that its manifest names."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items()
        return bool(manifest["content"]) and all(_checksum(folder / name) == entry["sha256"] for name, entry in files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(target: Path, files: Files) -> None:
    """Write a dataset folder, complete or not at all.

    An equal folder that is already there, perhaps from a process that was faster, stays; any other is replaced.

    Raises
    ------
    UserError
        If the cache cannot be written (full, read-only, a file in its place).
    """
    try:
        _publish(target, files)
    except OSError as error:
        raise UserError(
            f"cannot write the mini suite to '{target.parent}' ({error.strerror or error}); free space or set CM_CACHE "
            "to a folder that can be written"
        ) from error


def _publish(target: Path, files: Files) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write_folder(scratch, files)
        if target.exists() and not _same(scratch, target):
            remove(target)
        try:
            os.rename(scratch, target)
        except OSError:
            if not _same(scratch, target):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _same(scratch: Path, target: Path) -> bool:
    return intact(target) and (target / MANIFEST).read_bytes() == (scratch / MANIFEST).read_bytes()


def _write_folder(folder: Path, files: Files) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = _Pictures()
    content = hashlib.sha256()
    entries = {}
    for name, (types, rows) in files.items():
        features = datasets.Features({key: _feature(datasets, value) for key, value in types.items()})
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist([pictures.encode(row) for row in rows], schema=features.arrow_schema)
        pq.write_table(table, path, row_group_size=100)
        content.update(name.encode())
        for row in rows:
            content.update(json.dumps(row, default=pictures.pixels, sort_keys=True).encode())
        entries[name] = {"sha256": _checksum(path), "rows": len(rows)}
    manifest = {"files": entries, "content": content.hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _feature(datasets: Any, kind: Any) -> Any:
    """Short names for feature types: "str", "int", "image", [x] for a list of x, {..} for a struct."""
    if isinstance(kind, list):
        return datasets.List(_feature(datasets, kind[0]))
    if isinstance(kind, dict):
        return {key: _feature(datasets, value) for key, value in kind.items()}
    return datasets.Image() if kind == "image" else datasets.Value({"str": "string", "int": "int64"}[kind])


class _Pictures:
    """Encodes every picture once, however many rows show it."""

    def __init__(self) -> None:
        self._done: dict[int, tuple[Image.Image, bytes, str]] = {}

    def _facts(self, image: Image.Image) -> tuple[Image.Image, bytes, str]:
        if id(image) not in self._done:
            buffer = io.BytesIO()
            image.save(buffer, format="PNG", compress_level=1)
            pixels = hashlib.sha256(image.tobytes()).hexdigest()
            self._done[id(image)] = (image, buffer.getvalue(), pixels)  # holding the image keeps its id its own
        return self._done[id(image)]

    def encode(self, value: Any) -> Any:
        """`value` with images as PNG bytes, however deep they sit."""
        if isinstance(value, Image.Image):
            return {"bytes": self._facts(value)[1], "path": None}
        if isinstance(value, dict):
            return {key: self.encode(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.encode(item) for item in value]
        return value

    def pixels(self, image: Image.Image) -> str:
        """Checksum of the decoded picture."""
        return self._facts(image)[2]
