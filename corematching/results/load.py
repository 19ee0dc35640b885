"""Read stores back: every finished, failed or unscored cell of one or more experiments, as a pandas frame.

A store may have been cut off, copied by hand or mixed with other folders. Whatever cannot be read is left out and
named in :attr:`Results.problems` (and as a :class:`StoreWarning`); reading never fails because of one folder.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from corematching.errors import UserError
from corematching.results import remote
from corematching.results.manifest import UNPLACED, Manifest, read_manifest
from corematching.results.order import keep_order
from corematching.results.reading import SAMPLES, UnusableCell, one_line, read_cell
from corematching.results.spread import spread

FLOPS_PARTS = ("vision", "projector", "prefill", "decode", "lm_head", "overhead", "total")
CONVENTIONS = ("fastv_eq5", "llama_3ndm")
#: Text columns: always strings (possibly empty), so that grouping never meets a missing key.
TEXT = (
    *(
        "id",
        "folder",
        "experiment",
        "kind",
        "status",
        "model",
        "method",
        "method_name",
        "benchmark",
        "data",
        "version",
        "prompt",
    ),
    *("dtype", "metric", "note", "error", "hardware", "git_commit", "finished"),
)
TRACE = (
    "image_tokens",
    "tokens_entering_llm",
    "visual_tokens_per_layer",
    "kv_bytes",
    "dense_kv_bytes",
    "rows_read",
    "rows_held",
    "mass_read",
    "generated_tokens",
    "ffn_width",
    "ended_answers",
    "capped_answers",
    "cap",
)
NUMBERS = (
    *("limit", "seed", "n", "value", "scale", "seconds", "model_seconds", "place"),
    *TRACE,
    *(f"flops_{part}" for part in FLOPS_PARTS),
    *(f"flops_{name}" for name in CONVENTIONS),
)
OBJECTS = (
    "keep",
    "parameters",
    "settings",
    "model_config",
    "image_mode",
    "visual_tokens_by_layer",
    "neurons_by_layer",
    "bench",
    "versions",
)


_PART = 250
"""Cells that are read in one go."""


class StoreWarning(UserWarning):
    """A folder of a store was left out, or is incomplete."""


@dataclass(frozen=True)
class Problem:
    """One thing in a store that could not be used.

    Attributes
    ----------
    folder : str
        ``<experiment>/cells/<folder>``.
    reason : str
        One line saying why.
    """

    folder: str
    reason: str

    def __str__(self) -> str:
        return f"{self.folder}: {self.reason}"


@dataclass
class Results:
    """What one or more stores hold.

    Attributes
    ----------
    cells : pandas.DataFrame
        One row per cell, in a stable order; columns are :data:`TEXT`, :data:`NUMBERS` and :data:`OBJECTS`.
    problems : list of Problem
        Everything left out, in the order met.
    """

    cells: pd.DataFrame
    problems: list[Problem] = field(default_factory=list)

    def report(self, folder: str, reason: str) -> None:
        """Note a problem and warn about it."""
        problem = Problem(folder, reason)
        if problem not in self.problems:
            self.problems.append(problem)
            warnings.warn(f"left out {problem}", StoreWarning, stacklevel=3)

    def samples(self, folder: str, columns: Sequence[str]) -> pa.Table | None:
        """Columns of one cell's ``samples.parquet``, or ``None`` (and a warning) if it cannot be read."""
        path = Path(folder) / SAMPLES
        try:
            # The plain reader: the dataset machinery behind `read_table` costs several times as much per small file.
            with pq.ParquetFile(path) as file:
                problem = _unfit(file.schema_arrow, columns)
                if not problem:
                    return file.read(columns=list(columns), use_threads=False)
            self.report(_name(path.parent), f"samples.parquet {problem}")
        except FileNotFoundError:
            self.report(_name(path.parent), "samples.parquet is missing")
        except (OSError, pa.ArrowException) as error:
            self.report(_name(path.parent), f"samples.parquet cannot be read ({one_line(error)})")
        return None


def load_results(folders: Iterable[Path | str]) -> Results:
    """Read the stores of experiments.

    Parameters
    ----------
    folders
        Experiment folders (``<results_dir>/<experiment>``, each holding ``cells/``), or URLs of remote ones.

    Returns
    -------
    Results
        A cell that stands in several folders is taken once.

    Raises
    ------
    UserError
        If a folder does not exist or holds no ``cells`` folder.
    """
    results = Results(pd.DataFrame())
    records: dict[str, dict[str, Any]] = {}
    for number, folder in enumerate(map(remote.local, folders)):
        if not (folder / "cells").is_dir():
            raise UserError(
                f"{folder} is no experiment folder: it holds no 'cells' folder (expected <results_dir>/<experiment>)"
            )
        manifest = read_manifest(folder) or Manifest({})
        # Others are no cells: lock files, and folders still being written.
        cells = sorted(path for path in (folder / "cells").iterdir() if not path.name.startswith(".") and path.is_dir())
        parts = [cells[start : start + _PART] for start in range(0, len(cells), _PART)]
        for cell, row in chain.from_iterable(spread(_rows, parts, len(cells))):
            if isinstance(row, str):
                results.report(_name(cell), row)
                continue
            # Lines of a second folder stand behind those of the first.
            row.update(manifest.renamed(row["id"]))
            row["place"] = float(number * UNPLACED + manifest.place(row["method"], row["keep"]))
            records.setdefault(row["id"], row)
    results.cells = _frame(records.values())
    return results


def _rows(cells: Sequence[Path]) -> list[tuple[Path, dict[str, Any] | str]]:
    """Of each cell's folder its row, or why there is none."""
    found: list[tuple[Path, dict[str, Any] | str]] = []
    for cell in cells:
        try:
            found.append((cell, _row(read_cell(cell), cell)))
        except UnusableCell as reason:
            found.append((cell, str(reason)))
    return found


def _unfit(schema: pa.Schema, columns: Sequence[str]) -> str | None:
    """Why these columns cannot be read from a file of sample rows, or None."""
    for name in columns:
        if name not in schema.names:
            return f"has no column {name!r}"
        kind = schema.field(name).type
        if name in ("doc_id", "score") and not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            return f"has column {name!r} of type {kind}, not of numbers"
    return None


def _row(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One row of :attr:`Results.cells` from an intact ``cell.json``."""
    config, labels, provenance = record["config"], record["labels"], record["provenance"]
    score, trace, error = (record.get(part) or {} for part in ("score", "trace", "error"))
    flops, conventions = trace.get("flops") or {}, trace.get("flops_conventions") or {}
    row: dict[str, Any] = {
        "id": record["id"],
        "folder": str(folder),
        "experiment": folder.parent.parent.name,
        "kind": record["kind"],
        "status": record["status"],
        **{name: labels[name] for name in ("model", "method", "benchmark", "data")},
        "method_name": config["method"]["name"],
        "keep": labels["keep"],
        "parameters": {name: value for name, value in config["method"].items() if name not in ("name", "label")},
        "model_config": config["model"],
        "image_mode": config.get("image"),
        **{name: config["benchmark"].get(name) for name in ("version", "limit")},
        "prompt": config.get("prompt"),
        "dtype": config["model"].get("dtype"),
        "seed": config.get("seed"),
        "settings": _settings(config),
        "n": record.get("n"),
        **{name: score.get(name) for name in ("metric", "value", "scale", "note")},
        "error": f"{error['type']}: {error['message']}" if error else "",
        "hardware": hardware_name(provenance["hardware"]),
        "versions": provenance["versions"],
        **{name: provenance.get(name) for name in ("git_commit", "finished")},
        **{name: record["timing"].get(name) for name in ("seconds", "model_seconds")},
        **{name: trace.get(name) for name in (*TRACE, "visual_tokens_by_layer", "neurons_by_layer")},
        **{f"flops_{part}": flops.get(part) for part in FLOPS_PARTS},
        **{f"flops_{name}": conventions.get(name) for name in CONVENTIONS},
        "bench": record.get("bench"),
    }
    row.update({name: "" if row[name] is None else row[name] for name in TEXT})
    row.update({name: math.nan if row.get(name) is None else float(row[name]) for name in NUMBERS})
    return row


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a result besides method and its files, benchmark and prompt: ``generation.max_new_tokens``, ..."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if name in ("method", "files", "benchmark", "prompt"):
            continue
        flat |= {f"{name}.{key}": held for key, held in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


def hardware_name(hardware: Mapping[str, Any]) -> str:
    """The device a cell ran on, in words: the accelerator where there is one, else the processor and its cores."""
    if hardware.get("gpu"):
        return str(hardware["gpu"])
    return f"{hardware.get('cpu') or 'unknown CPU'} ({hardware.get('cores', '?')} cores)"


def _frame(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    columns = [*TEXT, *NUMBERS, *OBJECTS]
    rows = sorted(
        records,
        key=lambda row: (
            row["kind"],
            row["model"],
            row["benchmark"],
            row["method"],
            keep_order(row["keep"]),
            row["id"],
        ),
    )
    # Built column by column: an inferred frame would turn the mixed `keep` (none, counts, fractions) into floats.
    data = {
        name: pd.Series([row[name] for row in rows], dtype="float64" if name in NUMBERS else object) for name in columns
    }
    return pd.DataFrame(data, columns=columns)


def _name(cell: Path) -> str:
    return "/".join(cell.parts[-3:])
