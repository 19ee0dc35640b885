"""The text road: ``python run.py +experiment=real_language_model`` measures methods by the text that follows a context.

Cells go into the same store as other accuracy cells: a question is one decoded token, its score whether the likeliest
token is the text's, its clustering unit the window. Perplexity stands in the cell's metrics and in ``perplexity.md``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch
import transformers
from omegaconf import DictConfig

import corematching as cm
from corematching.answering.generator import Answer
from corematching.benchmarks import load_source
from corematching.engine.preflight import check_methods
from corematching.evaluation import asks
from corematching.evaluation.attempt import attempt, finished
from corematching.evaluation.banner import banner, small_note
from corematching.evaluation.cells import Cell
from corematching.evaluation.evaluator import build
from corematching.evaluation.experiment import (
    Experiment,
    forced_since,
    method_identity,
    method_rows,
    model_identity,
    model_label,
)
from corematching.evaluation.progress import Reporter
from corematching.evaluation.publishing import publish_run
from corematching.evaluation.settings import read_settings
from corematching.evaluation.trace_summary import summarise
from corematching.models.assembled import tokenizer_of
from corematching.models.loading import load_config, model_path
from corematching.perplexity.forced import Forced, force
from corematching.perplexity.table import BENCHMARK, METRIC, perplexity_table
from corematching.perplexity.text import Protocol, read_text, windows_of
from corematching.results import remote
from corematching.results.store import Store
from corematching.results.terminal import show


def run(config: DictConfig) -> int:
    """Measure what the store lacks and print the table.

    Returns
    -------
    int
        Exit status: 0 all cells have results, 1 some failed.

    Raises
    ------
    UserError
        For a wrong setting, a method that does not fit the model, or a model or text that is not installed.
    """
    settings = read_settings(config)
    text = read_text(settings["text"])
    experiment = planned(settings, text)
    reader = Reader(settings, text)
    reader.check_methods(experiment)
    store = Store(experiment.folder)
    experiment.manifest.write(experiment.folder)
    pending = [cell for cell in experiment.cells if not finished(store.read(cell.id), experiment)]
    with Reporter(len(pending)) as reporter:
        for line in banner(settings, answers=False):
            reporter.say(line)
        reporter.say(
            f"{experiment.name}: {len(experiment.cells)} cells, {len(pending)} to run"
            f" -> {remote.shown(experiment.folder)}"
        )
        for cell in pending:
            attempt([cell], experiment, reader, store, reporter)
        if pending and settings["report"]:
            publish_run(store.root, reporter.say, lambda make: None)
        return conclude(experiment, store, reporter)


def planned(settings: Mapping[str, Any], text: str) -> Experiment:
    """One cell per method, budget and seed; a cell's identity holds the text's digest."""
    identity, source = model_identity(settings["model"]), settings["text"]
    rows = tuple(method_rows(settings))
    version = hashlib.sha256(text.encode()).hexdigest()[:16]
    cells = [
        Cell.of(
            {
                "model": identity,
                **method_identity(row),
                "benchmark": {
                    "name": BENCHMARK,
                    "data": source["package"],
                    "version": version,
                    "limit": source["windows"],
                },
                "prompt": f"{source['context']} tokens of context, {source['tokens']} decoded",
                "seed": settings["seed"],
            },
            model=model_label(identity),
            method=row.label,
            keep=row.keep,
            benchmark=BENCHMARK,
            data=source["title"],
        )
        for row in rows
    ]
    folder, since = asks.folder_of(settings), forced_since(settings["force"])
    data = load_source(**settings["data"])
    return Experiment(folder.name, folder, tuple(dict.fromkeys(cells)), rows, (), data, settings, since)


def conclude(experiment: Experiment, store: Store, reporter: Reporter) -> int:
    """Write and print the table; returns the exit status."""
    records = [(cell, store.read(cell.id)) for cell in experiment.cells]
    done = [(cell, record) for cell, record in records if record is not None and record["status"] == "done"]
    note = small_note(experiment.settings, answers=False)
    table = perplexity_table(
        [(row, store.samples(row["id"])) for row in ({**record, "labels": cell.label} for cell, record in done)],
        filter(None, [note]),
    )
    table.write(store.root, "perplexity")
    show(table, reporter.console)
    reporter.say(f"table: {store.root / 'perplexity.md'}, {store.root / 'perplexity.csv'}")
    if len(done) < len(records):
        reporter.say(f"{len(records) - len(done)} of {len(records)} cells failed: see {store.cells}/<id>/cell.json")
    store.upload()
    return 1 if len(done) < len(records) else 0


class Reader:
    """Evaluates the cells of a text experiment; the model and the tokens are made at the first one."""

    def __init__(self, settings: Mapping[str, Any], text: str) -> None:
        self.settings, self.text = settings, text
        source = settings["text"]
        self.protocol = Protocol(source["windows"], source["context"], source["tokens"])
        self._loaded: tuple[Any, list[list[int]]] | None = None

    def check_methods(self, experiment: Experiment) -> None:
        """Refuse methods that do not fit the model, before anything is written."""
        chosen = self.settings["model"]
        config = load_config(chosen["path"], chosen["weights"], chosen["num_layers"], chosen["revision"])
        check_methods(dict.fromkeys(build(cell) for cell in experiment.cells), config, model_path(chosen["path"]))

    def loaded(self) -> tuple[Any, list[list[int]]]:
        """The model and the windows' token ids."""
        if self._loaded is None:
            transformers.utils.logging.disable_progress_bar()
            chosen = self.settings["model"]
            ids = tokenizer_of(model_path(chosen["path"]))(self.text).input_ids
            windows = windows_of(ids, self.protocol)
            model, _ = cm.load_model(
                chosen["path"],
                dtype=None if chosen["dtype"] == "auto" else chosen["dtype"],
                device=None if chosen["device"] == "auto" else chosen["device"],
                num_layers=chosen["num_layers"],
                revision=chosen["revision"],
            )
            self._loaded = model, windows
        return self._loaded

    def answered(self, cell: Cell) -> bool:
        """Never: cells of this road are computed one at a time."""
        return False

    def evaluate(self, cell: Cell, on_progress: Callable[[int, int], None]) -> tuple[dict[str, Any], pd.DataFrame]:
        """Run one cell; returns what its record holds of results, and one row per decoded token."""
        (model, windows), method, found = self.loaded(), build(cell), []
        with torch.inference_mode(), method(model) as trace:
            for number, window in enumerate(windows, 1):
                found.append(force(model, trace, window, self.protocol.context))
                on_progress(number, len(windows))
        samples = rows_of(found)
        answers = [Answer("", len(one.nll) + 1, one.trace) for one in found]
        nll = float(samples["nll"].mean())
        record = {
            "status": "done",
            "score": {"metric": METRIC, "value": 100 * float(samples["score"].mean()), "scale": 100.0, "note": ""},
            "metrics": {"nll": nll, "perplexity": float(torch.tensor(nll).exp())},
            "n": len(samples),
            "trace": summarise(answers, model.config),
        }
        return record, samples


def rows_of(found: list[Forced]) -> pd.DataFrame:
    """One row per predicted token, in the columns of other benchmarks' questions; ``nll`` in nats."""
    rows = [
        {
            "doc_id": 0,
            "part": "",
            "unit": str(window),
            "question_id": f"{window}/{place}",
            "question": "",
            "prompt": "",
            "prediction": str(said),
            "target": str(target),
            "score": float(said == target),
            "nll": nll,
            "retained_tokens": 0.0,
        }
        for window, one in enumerate(found)
        for place, (said, target, nll) in enumerate(
            zip(one.said.tolist(), one.targets.tolist(), one.nll.tolist(), strict=True)
        )
    ]
    return pd.DataFrame(rows).assign(doc_id=range(len(rows)))
