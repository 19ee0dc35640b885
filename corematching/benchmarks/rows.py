"""Read, check and cut the rows of one part of a benchmark.

Checks run before anything is computed and cost little: they read the text columns only. Whatever is wrong is told in
one line that names dataset, split, row and column. Images are decoded when a row is asked for, and a broken one is told
in the same way.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import io
import itertools
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from corematching.benchmarks.spec import ROW, Benchmark, Column, ImageTable, Part, unit_name
from corematching.errors import UserError
from corematching.files import cache_home

#: Bytes of parquet from which on the conversion takes long enough to show its progress.
_SHOW_PROGRESS = 500_000_000


class CheckedDataset(datasets.Dataset):
    """A dataset whose rows, when they cannot be decoded, say which row and column of which dataset is broken."""

    where: str
    total: int

    @classmethod
    def wrap(cls, dataset: datasets.Dataset, where: str, total: int) -> CheckedDataset:
        """Take over the rows of `dataset`; `where` names dataset and split in messages, `total` counts all its rows."""
        checked = cls(dataset.data, dataset.info, dataset.split, dataset._indices, dataset._fingerprint)
        checked.where = where
        checked.total = total
        return checked

    def __getitem__(self, key: Any) -> Any:
        try:
            return super().__getitem__(key)
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises on broken image data
            raise UserError(self._broken(key)) from error

    def _broken(self, key: Any) -> str:
        raw = datasets.Dataset(self.data, self.info, self.split, self._indices)
        media = [name for name, feature in self.features.items() if _image_feature(feature)]
        for name in media:
            feature = self.features[name]
            raw = raw.cast_column(name, _image_feature(feature, decode=False))
        row = raw[key]
        number = row.get(ROW, key)
        for name in media:
            values = row[name] if isinstance(row[name], list) else [row[name]]
            if not all(value is None or _decodes(value["bytes"]) for value in values):
                return f"{self.where}, row {number}, column {name}: the image cannot be decoded"
        return f"{self.where}, row {number}: the row cannot be read"


def _image_feature(feature: Any, decode: bool = True) -> Any:
    """The feature as an image (or list of images) feature with the given decode flag; None for anything else."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=decode)
    if isinstance(getattr(feature, "feature", None), datasets.Image):
        return datasets.List(datasets.Image(decode=decode))
    return None


def _decodes(data: bytes | None) -> bool:
    try:
        Image.open(io.BytesIO(data or b"")).load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def load_rows(benchmark: Benchmark, part: Part, root: Path, limit: int | None = None, first: int = 0) -> CheckedDataset:
    """Load the rows of one part.

    Parameters
    ----------
    benchmark, part
        What to load.
    root
        Local folder with the files of the dataset repository.
    limit
        Number of questions to keep; None keeps all. Questions that are scored together (the two of an MME image, the
        rotations of an MMBench question) are kept together, so a few more rows than `limit` may come back. Where the
        benchmark has categories they are visited in turn, so that a small limit still sees all of them.
    first
        Added to the row numbers in column `ROW`.

    Raises
    ------
    UserError
        If files, columns or values are not what the scoring code needs.
    """
    where = f"{benchmark.repo}, split {part.split}"
    files = find_files(root, part.files, where)
    table = _read_checked(files, benchmark.columns, where)
    if table.num_rows == 0:
        raise UserError(f"{where}: no rows")
    rows = select_rows(benchmark, table, limit, where)
    sizes = [pq.ParquetFile(file).metadata.num_rows for file in files]
    starts = [0, *itertools.accumulate(sizes)]
    wanted = sorted({bisect.bisect_right(starts, row) - 1 for row in rows})
    numbers = [number for i in wanted for number in range(starts[i], starts[i + 1])]
    dataset = _read_dataset([files[i] for i in wanted], benchmark.columns)
    dataset = dataset.add_column(ROW, [first + number for number in numbers])
    if len(rows) < len(numbers):
        position = {number: i for i, number in enumerate(numbers)}
        dataset = dataset.select([position[row] for row in rows])
    return CheckedDataset.wrap(dataset, where, table.num_rows)


def load_images(benchmark: Benchmark, table: ImageTable, root: Path) -> tuple[CheckedDataset, dict[str, int]]:
    """Load images that are kept apart from the questions; returns them and the row of each image id."""
    where = f"{benchmark.repo}, split {table.split}"
    files = find_files(root, table.files, where)
    columns = {table.id: Column("text"), table.column: Column("image")}
    ids = _read_checked(files, columns, where)[table.id].to_pylist()
    dataset = CheckedDataset.wrap(_read_dataset(files, columns), where, len(ids))
    return dataset, {key: row for row, key in enumerate(ids)}


def find_files(root: Path, pattern: str, where: str) -> list[Path]:
    """Files under `root` that match the glob, sorted; raises `UserError` if there are none."""
    files = sorted(root.glob(pattern))
    if not files:
        raise UserError(f"{where}: no file matches {pattern}")
    return files


def _read_checked(files: Sequence[Path], columns: Mapping[str, Column], where: str) -> pa.Table:
    """Check schema and values; returns the columns that hold no images."""
    tables = []
    light = [name for name, column in columns.items() if not column.is_media]
    for file in files:
        try:
            schema = pq.read_schema(file)
            for name, column in columns.items():
                _check_type(schema, name, column, where)
            tables.append(pq.read_table(file, columns=light))
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{where}: {file.name} is not a readable parquet file") from error
    table = pa.concat_tables(tables, promote_options="permissive")
    for name in light:
        _check_values(table[name], name, columns[name], where)
    return table


def _check_type(schema: pa.Schema, name: str, column: Column, where: str) -> None:
    if name not in schema.names:
        raise UserError(f"{where}: column {name} is missing; the columns are {', '.join(schema.names)}")
    found = schema.field(name).type
    if not _fits(found, column):
        fields = f" with {', '.join(column.fields)}" if column.fields else ""
        raise UserError(f"{where}, column {name}: expected {column.type}{fields}, found {found}")


def _fits(found: pa.DataType, column: Column) -> bool:
    if column.nullable and pa.types.is_null(found):
        return True
    inner = found.value_type if pa.types.is_list(found) or pa.types.is_large_list(found) else None
    match column.type:
        case "text":
            return _is_text(found)
        case "texts":
            return inner is not None and _is_text(inner)
        case "int":
            return pa.types.is_integer(found)
        case "image":
            return _is_image(found)
        case "images":
            return inner is not None and _is_image(inner)
        case "records":
            if inner is None or not pa.types.is_struct(inner):
                return False
            return set(column.fields) <= {inner.field(i).name for i in range(inner.num_fields)}
    return True


def _is_text(found: pa.DataType) -> bool:
    return pa.types.is_string(found) or pa.types.is_large_string(found)


def _is_image(found: pa.DataType) -> bool:
    return pa.types.is_struct(found) and found.get_field_index("bytes") >= 0


def _check_values(values: pa.ChunkedArray, name: str, column: Column, where: str) -> None:
    if not column.nullable and values.null_count:
        row = pc.index(pc.is_null(values), True).as_py()
        raise UserError(f"{where}, row {row}, column {name}: no value")
    if column.type == "text":
        _check_text(values, name, where)
    if column.type in ("texts", "records") and pc.list_flatten(values).null_count:
        for row, items in enumerate(values.to_pylist()):
            if items is not None and any(item is None for item in items):
                raise UserError(f"{where}, row {row}, column {name}: one of its values is missing")
    if column.values:
        allowed = pc.is_in(values, value_set=pa.array(column.values))
        row = pc.index(pc.or_(allowed, pc.is_null(values)), False).as_py()
        if row >= 0:
            raise UserError(
                f"{where}, row {row}, column {name}: {values[row].as_py()!r} is not one of {', '.join(column.values)}"
            )


def _check_text(values: pa.ChunkedArray, name: str, where: str) -> None:
    """Refuse bytes that are no UTF-8."""
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        for row, value in enumerate(values.cast(pa.large_binary()).to_pylist()):
            try:
                (value or b"").decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{where}, row {row}, column {name}: the text is not UTF-8") from error


def select_rows(benchmark: Benchmark, table: pa.Table, limit: int | None, where: str) -> list[int]:
    """Row numbers to keep under `limit`, ascending (see `load_rows`)."""
    together = benchmark.unit_size is not None or benchmark.unit_modulo is not None
    if limit is None and not together:
        return list(range(table.num_rows))
    units: dict[str, list[int]] = defaultdict(list)
    for row, doc in enumerate(table.select(list(benchmark.unit)).to_pylist() if together else [{}] * table.num_rows):
        units[unit_name(benchmark, doc) if together else str(row)].append(row)
    for key, rows in units.items():
        if benchmark.unit_size is not None and len(rows) != benchmark.unit_size:
            raise UserError(
                f"{where}, row {rows[0]}, column {benchmark.unit[-1]}: {key} has {len(rows)} question(s), "
                f"expected {benchmark.unit_size}"
            )
    if limit is None:
        return list(range(table.num_rows))
    categories: dict[Any, list[list[int]]] = defaultdict(list)
    labels = table[benchmark.category].to_pylist() if benchmark.category in table.column_names else None
    for rows in units.values():
        categories[labels[rows[0]] if labels else None].append(rows)
    kept: list[int] = []
    for rows in itertools.chain.from_iterable(itertools.zip_longest(*categories.values())):
        if len(kept) >= limit:
            break
        kept += rows or []
    return sorted(kept)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _convert(files: Sequence[Path], folder: Path) -> datasets.Dataset:
    """The files as a dataset in `folder`; a conversion there that turns out to be damaged is made again."""
    paths = [str(file) for file in files]
    try:
        return datasets.Dataset.from_parquet(paths, cache_dir=str(folder))
    except (OSError, pa.ArrowException, datasets.exceptions.DatasetsError):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        return datasets.Dataset.from_parquet(paths, cache_dir=str(folder))
    except (OSError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(
            f"cannot convert data in '{folder.parent}' ({reason}); free space or set CM_CACHE to a folder that can be "
            "written"
        ) from error


def _read_dataset(files: Sequence[Path], columns: Mapping[str, Column]) -> datasets.Dataset:
    """Memory-mapped dataset of these files.

    The conversion is cached in a folder named after path, size and time of the files, because the cache of `datasets`
    can confuse files that were rewritten or folders that share a name.
    """
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    folder = cache_home() / "arrow" / hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    with _quiet() if sum(size for _, size, _ in facts) < _SHOW_PROGRESS else contextlib.nullcontext():
        dataset = _convert(files, folder)
    for name, column in columns.items():
        if column.type == "image" and not isinstance(dataset.features[name], datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image())
    return dataset
