"""Roads beside the benchmarks', whose cells are computed one at a time: running text, long answers.

A road plans its cells and brings a :class:`Reader`; what goes on around them is here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import pandas as pd
import transformers

from corematching.benchmarks import load_source
from corematching.engine.preflight import check_methods
from corematching.errors import UserError
from corematching.evaluation import asks
from corematching.evaluation.attempt import attempt, finished
from corematching.evaluation.banner import banner, small_note
from corematching.evaluation.cells import Cell
from corematching.evaluation.chosen import config_of, load_chosen, place_of
from corematching.evaluation.evaluator import build
from corematching.evaluation.experiment import Experiment, Row, forced_since, method_identity, model_label
from corematching.evaluation.progress import Reporter
from corematching.evaluation.publishing import publish_run
from corematching.models.loading import model_path
from corematching.results import remote
from corematching.results.figures.canvas import ShownFigure, save
from corematching.results.store import Store
from corematching.results.table import RunTable
from corematching.results.terminal import show

Read = tuple[Mapping[str, Any], pd.DataFrame]
"""A finished cell's record and its sample rows."""


class Reader(ABC):
    """Evaluates the cells of one experiment; the model is loaded at the first."""

    name: ClassVar[str]
    """Of the files of table and figure."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.settings = experiment, experiment.settings
        self._loaded: tuple[Any, Any] | None = None

    @abstractmethod
    def evaluate(self, cell: Cell, on_progress: Callable[[int, int], None]) -> tuple[dict[str, Any], pd.DataFrame]:
        """Run one cell; returns what its record holds of results, and one row per decoded token."""

    @abstractmethod
    def table(self, cells: Sequence[Read], told: Iterable[str]) -> RunTable:
        """What is printed and written of the finished cells, with notes."""

    def figure(self, records: Sequence[Mapping[str, Any]]) -> ShownFigure | None:
        """What is drawn of them, if anything."""
        return None

    def refusal(self, method: Any, config: Any) -> str | None:
        """Why a method that fits the model has nothing to show on this road, if it has not."""
        return None

    def check_methods(self) -> None:
        """Refuse methods that do not fit, before anything is written.

        Raises
        ------
        UserError
            For the first that does not fit.
        """
        chosen = self.settings["model"]
        config, methods = config_of(chosen), dict.fromkeys(build(cell) for cell in self.experiment.cells)
        check_methods(methods, config, model_path(place_of(chosen)))
        for method in methods:
            if reason := self.refusal(method, config):
                raise UserError(reason)

    def loaded(self) -> tuple[Any, Any]:
        """The model and its processor (None for random weights)."""
        if self._loaded is None:
            transformers.utils.logging.disable_progress_bar()
            dtype = self.experiment.cells[0].config["model"]["dtype"]
            self._loaded = load_chosen(self.settings["model"], dtype, self.settings["seed"])
        return self._loaded

    def answered(self, cell: Cell) -> bool:
        """Never: cells are computed one at a time."""
        return False


def run(reader: Reader) -> int:
    """Measure what the store lacks; write and print table and figure.

    Returns
    -------
    int
        Exit status: 0 all cells have results, 1 some failed.

    Raises
    ------
    UserError
        For a method that does not fit the model.
    """
    experiment = reader.experiment
    settings, folder = experiment.settings, experiment.folder
    reader.check_methods()
    store = Store(folder)
    experiment.manifest.write(folder)
    pending = [cell for cell in experiment.cells if not finished(store.read(cell.id), experiment)]
    with Reporter(len(pending)) as reporter:
        for line in banner(settings, answers=False):
            reporter.say(line)
        cells = f"{len(experiment.cells)} cells, {len(pending)} to run"
        reporter.say(f"{experiment.name}: {cells} -> {remote.shown(folder)}")
        for cell in pending:
            attempt([cell], experiment, reader, store, reporter)
        if pending and settings["report"]:
            publish_run(store.root, reporter.say, lambda make: None)
        return conclude(reader, store, reporter)


def conclude(reader: Reader, store: Store, reporter: Reporter) -> int:
    """Write and print the table, and write the figure; returns the exit status."""
    records = [(cell, store.read(cell.id)) for cell in reader.experiment.cells]
    done = [
        {**record, "labels": cell.label}
        for cell, record in records
        if record is not None and record["status"] == "done"
    ]
    note = small_note(reader.settings, answers=False)
    table = reader.table([(record, store.samples(record["id"])) for record in done], filter(None, [note]))
    table.write(store.root, reader.name)
    show(table, reporter.console)
    wrote = "table: " + ", ".join(f"{remote.shown(store.root)}/{reader.name}.{suffix}" for suffix in ("md", "csv"))
    if (figure := reader.figure(done)) is not None:
        save(figure, store.root / "figures", reader.name)
        wrote += f"; figure: {remote.shown(store.root)}/figures/{reader.name}.png"
    reporter.say(wrote)
    if len(done) < len(records):
        reporter.say(f"{len(records) - len(done)} of {len(records)} cells failed: see {store.cells}/<id>/cell.json")
    store.upload()
    return 1 if len(done) < len(records) else 0


def experiment_of(settings: Mapping[str, Any], rows: Sequence[Row], cells: Iterable[Cell]) -> Experiment:
    """The experiment that computes these cells."""
    folder, since = asks.folder_of(settings), forced_since(settings["force"])
    data = load_source(**settings["data"])
    return Experiment(folder.name, folder, tuple(dict.fromkeys(cells)), tuple(rows), (), data, settings, since)


def cell_of(
    identity: Mapping[str, Any], row: Row, benchmark: Mapping[str, Any], prompt: str, seed: int, data: str, **also: Any
) -> Cell:
    """A cell of a model and a method; ``data`` is what its table calls the data, ``also`` what else decides it."""
    said = {"model": identity, **method_identity(row), "benchmark": benchmark, "prompt": prompt, "seed": seed, **also}
    label = {"method": row.label, "keep": row.keep, "benchmark": benchmark["name"], "data": data}
    return Cell.of(said, model=model_label(identity), **label)


def token_row(unit: int, place: int, said: int, target: int) -> dict[str, Any]:
    """A decoded token in the columns of other benchmarks' questions; its unit (a prompt, a window) clusters it."""
    return {
        "doc_id": 0,
        "part": "",
        "unit": str(unit),
        "question_id": f"{unit}/{place}",
        "question": "",
        "prompt": "",
        "prediction": str(said),
        "target": str(target),
        "score": float(said == target),
        "retained_tokens": 0.0,
    }
