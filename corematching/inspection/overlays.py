"""Which image patches each method keeps, for a few questions: recorded here, drawn in the report.

The store holds counts, not indices, so the overlays come from running the experiment's methods again on a few
questions; traces are exact. They lie in ``<experiment>/overlays/``: ``overlays.json`` and one PNG per image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from corematching import files
from corematching.answering.generator import Generator
from corematching.benchmarks.data import load_source
from corematching.benchmarks.spec import ROW, available_benchmarks, load_benchmark
from corematching.benchmarks.tasks import build_tasks
from corematching.errors import UserError
from corematching.inspection.evidence import Example, question_of
from corematching.results.accuracy import contexts, methods_of
from corematching.results.figures.about import is_bundled
from corematching.results.overlays import FILE, SCHEMA
from corematching.results.tables import budget
from corematching.results.titles import benchmark_order


@dataclass(frozen=True)
class Variant:
    """A method as a row of the tables: its label, its budget in words and the installed object."""

    label: str
    keep: str
    method: Any


def variants_of(rows: Sequence[Mapping[str, Any]]) -> list[Variant]:
    """Build the methods of table rows (with ``method``, ``method_name``, ``keep``, ``parameters``)."""
    import corematching as cm

    variants = []
    for row in rows:
        parameters = dict(row["parameters"])
        second = parameters.pop("with", None)
        method = cm.build_method(row["method_name"], **parameters)
        if second:
            rest = {name: value for name, value in second.items() if name != "name"}
            method = cm.compose(method, cm.build_method(second["name"], **rest))
        variants.append(Variant(row["method"], budget(row["keep"]), method))
    return variants


def record(generator: Any, variants: Sequence[Variant], examples: Sequence[Example], folder: Path) -> Path:
    """Answer the examples under every variant and write the overlays.

    Parameters
    ----------
    generator : corematching.answering.generator.Generator
    variants
        Methods and budgets, in the order shown.
    examples
        Questions; those about the same image object share a file.
    folder
        ``<experiment>/overlays``; what it holds is replaced.

    Returns
    -------
    Path
        ``overlays.json``.
    """
    # First what names the images: a recording that is cut off then leaves nothing that could be shown wrongly.
    for leftover in (folder / FILE, *folder.glob("*.png")):
        leftover.unlink(missing_ok=True)
    asked = [question_of(one, max_new_tokens=16) for one in examples]
    entries: list[dict[str, Any]] = []
    for place, one in enumerate(examples):
        first = next(index for index, other in enumerate(examples) if other.image == one.image)
        if first == place:
            with files.replacing(folder / f"{place}.png") as temporary:
                one.image.convert("RGB").save(temporary)
        about = {"image": f"{first}.png", "benchmark": one.benchmark, "question": one.question, "target": one.target}
        entries.append({**about, "answers": []})
    for variant in variants:
        for entry, answer in zip(entries, generator.answer(asked, variant.method), strict=True):
            entry["tile"] = _tile(answer.trace)
            stages = _stages(answer.trace.visual_tokens)
            shown = {"method": variant.label, "keep": variant.keep, "prediction": answer.text, "stages": stages}
            entry["answers"].append(shown)
    text = json.dumps({"schema": SCHEMA, "examples": entries}, separators=(",", ":"))
    return files.write(folder / FILE, text + "\n")


def _tile(trace: Any) -> dict[str, int] | None:
    """The grid of the first image's tokens to draw: the finest that shows all of it.

    Token (row, column) of the grid is visual token ``first + row * stride + column``.
    """
    first, found = 0, None
    for tile in trace.shown[0].tiles if trace.shown else ():
        if tile.box == (0.0, 0.0, 1.0, 1.0) and (
            found is None or tile.rows * tile.columns > found["rows"] * found["columns"]
        ):
            stride = tile.columns + (tile.newline == "row")
            found = {"first": first, "rows": tile.rows, "columns": tile.columns, "stride": stride}
        first += tile.tokens
    return found


def record_experiment(cells: pd.DataFrame, folder: Path, images: int) -> Path:
    """Load an experiment's model and record overlays for the first questions of its first benchmark.

    Parameters
    ----------
    cells
        Selected cells (see :func:`corematching.results.compare.select`); the first context is taken.
    folder
        ``<experiment>/overlays``.
    images
        How many images to show; all shown questions are of different images.

    Raises
    ------
    UserError
        If no cell of a benchmark is done (texts and long_decode are none), or the model or its data is missing.
    """
    import corematching as cm

    done = _drawn(cells)
    if done.empty:
        raise UserError("no cell of this experiment is done: there is nothing to draw overlays for")
    group = contexts(done)[0][1]
    first = group[group["benchmark"] == benchmark_order(group["benchmark"])[0]].iloc[0]
    examples = stored_examples(first, images)
    chosen = first["model_config"]
    model, processor = cm.load_model(
        chosen["path"],
        weights=chosen["weights"],
        dtype=chosen["dtype"],
        num_layers=chosen.get("num_layers"),
        # Weights that lie in a folder are identified by a digest, which is no revision to ask a hub for.
        revision=None if is_bundled(chosen) or Path(chosen["path"]).expanduser().is_dir() else chosen["revision"],
    )
    generator = Generator(model, processor, first["prompt"], first["image_mode"] or "pad")
    return record(generator, variants_of(methods_of(group).to_dict("records")), examples, folder)


def uses_bundled_model(cells: pd.DataFrame) -> bool:
    """Whether all finished cells are of a bundled model that was shown images (and there are any)."""
    done = _drawn(cells)
    return len(done) > 0 and bool((done["image_tokens"] > 0).all()) and all(map(is_bundled, done["model_config"]))


def _drawn(cells: pd.DataFrame) -> pd.DataFrame:
    """The finished cells whose questions can be asked again: those of benchmarks."""
    return cells[(cells["status"] == "done") & cells["benchmark"].isin(available_benchmarks())]


def stored_examples(cell: pd.Series, count: int) -> list[Example]:
    """The first questions of a cell's benchmark, one per image, with the targets that the cell stored."""
    settings = {} if cell["data"] == "mini" else {"revision": cell["version"]}
    source, benchmark = load_source(cell["data"], **settings), load_benchmark(cell["benchmark"])
    if source.version(benchmark) != cell["version"]:
        raise UserError(
            f"the {cell['data']} data of {benchmark.name} changed since the run: its overlays would not fit"
        )
    rows = pd.read_parquet(Path(cell["folder"]) / "samples.parquet", columns=["doc_id", "unit", "target"])
    # The limit counts questions, and neighbours often share an image: ask for more than will be shown.
    (task, *_) = build_tasks(benchmark, source, cell["prompt"], limit=12 * count)
    docs = {int(doc[ROW]): doc for doc in task.eval_docs}
    chosen = rows[rows["doc_id"].isin(docs)].drop_duplicates("unit").head(count)
    return [
        Example(task.doc_to_visual(doc)[0], task.doc_to_text(doc), str(row.target), cell["benchmark"])
        for row in chosen.itertuples()
        for doc in [docs[row.doc_id]]
    ]


def _stages(by_layer: Sequence[Any]) -> list[dict[str, Any]]:
    """Kept tokens where they change: the first layer they enter, and their original indices."""
    stages: list[dict[str, Any]] = []
    for layer, tokens in enumerate(by_layer):
        kept = [index for index in tokens.tolist() if index >= 0]
        if not stages or kept != stages[-1]["kept"]:
            stages.append({"layer": layer, "kept": kept})
    return stages
