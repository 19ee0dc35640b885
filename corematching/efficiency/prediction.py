"""The paper's devices: ``python run.py +experiment=paper_hardware`` predicts times and memory, and measures nothing.

Every method runs on a narrow twin of every model (:mod:`corematching.efficiency.twin`), which says what it does to
tokens, KV rows and neurons; the roofline model says what that takes on every card, in the card's own type. Rows go into
the same store as measured ones and say that they are predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from omegaconf import DictConfig

from corematching import build_method
from corematching.cost.roofline import Hardware
from corematching.efficiency.bench import VERSION, method_of, result, show_table
from corematching.efficiency.rows import predicted_rows
from corematching.efficiency.twin import trace_of_shapes
from corematching.engine.preflight import check_methods
from corematching.engine.trace import SampleTrace
from corematching.errors import UserError
from corematching.evaluation import asks
from corematching.evaluation.attempt import begun
from corematching.evaluation.cells import Cell
from corematching.evaluation.experiment import Row, forced_since, method_identity, method_rows
from corematching.evaluation.publishing import outdated, publish_run
from corematching.evaluation.records import describe, new_record
from corematching.evaluation.settings import read_settings
from corematching.methods.base import Method
from corematching.models.loading import load_config, model_path
from corematching.results.manifest import Manifest
from corematching.results.store import Store
from corematching.texts import neutral


def run(config: DictConfig) -> int:
    """Predict what the store lacks and print the table.

    Returns
    -------
    int
        Exit status: 0.

    Raises
    ------
    UserError
        For a wrong setting, or a method that does not fit a model; that a card is too small is said in the table.
    """
    settings = read_settings(config)
    planned, folder = plans(settings), asks.folder_of(settings)
    store = Store(folder)
    rows = dict.fromkeys((plan.row.label, plan.row.keep) for plan in planned)
    Manifest(asks.ask_of(settings), [list(row) for row in rows]).write(folder)
    pending = [plan for plan in planned if not plan.is_done(store)]
    devices = len(settings["hardware"])
    print(f"{folder.name}: {len(planned)} pairs of model and method on {devices} devices, {len(pending)} to predict")
    dense: dict[str, SampleTrace] = {}
    for plan in pending:
        print(f"  {plan.model}, {neutral(plan.row.label)} ...", flush=True)
        if plan.model not in dense:
            dense[plan.model] = plan.trace(build_method("dense"))
        plan.store(store, dense[plan.model])
    if settings["report"] and (pending or outdated(store)):
        publish_run(folder, print, lambda make: None)
    told = [line for plan in planned for line in plan.refusals(store)]
    show_table(store, [cell for plan in planned for _, cell in plan.cells()], told)
    store.upload()
    return 0


def plans(settings: Mapping[str, Any]) -> list[Plan]:
    """Every method on every model."""
    return [one for name in models_of(settings) for one in Plan.of(settings, name)]


def outlook(settings: Mapping[str, Any]) -> tuple[int, int]:
    """How many pairs of model and method there are, and how many the store lacks."""
    planned, folder = plans(settings), asks.folder_of(settings)
    store = Store(folder) if (folder / "cells").is_dir() else None
    return len(planned), sum(store is None or not plan.is_done(store) for plan in planned)


def models_of(settings: Mapping[str, Any]) -> list[str]:
    """The models asked for: ``model=NAME`` on the command line, else those of the experiment."""
    chosen = any(asks.key_of(word) == "model" for word in settings["command"])
    return [settings["model"]["name"]] if chosen else list(dict.fromkeys(settings["prediction"]["models"]))


class Plan:
    """One method on one model: its rows on every card and at every output length."""

    def __init__(self, settings: Mapping[str, Any], model: str, config: Any, row: Row, method: Method) -> None:
        self.settings, self.model, self.config, self.row, self.method = settings, model, config, row, method
        self.cards = [Hardware(**card) for card in settings["hardware"]]
        self.lengths = list(dict.fromkeys(settings["prediction"]["output_tokens"]))

    @classmethod
    def of(cls, settings: Mapping[str, Any], model: str) -> Iterator[Plan]:
        """Every method of an experiment on a model.

        Raises
        ------
        UserError
            If a method does not fit the model, or a device has no public figures.
        """
        if any(card["flops"] is None for card in settings["hardware"]):
            raise UserError("hardware=this has no public figures: choose cards, or measure with +experiment=efficiency")
        config = load_config(model, "random")
        methods = {row: method_of(row) for row in method_rows(settings)}
        check_methods(methods.values(), config, model_path(model))
        for row, method in methods.items():
            yield cls(settings, model, config, row, method)

    def trace(self, method: Method) -> SampleTrace:
        """What a method does to the prompt, from shapes alone."""
        prompt = self.settings["prediction"]
        return trace_of_shapes(self.config, method, prompt["before"], prompt["after"])

    def cells(self) -> Iterator[tuple[Hardware, Cell]]:
        """One per card and output length."""
        prompt = self.settings["prediction"]
        for card in self.cards:
            for tokens in self.lengths:
                config = {
                    "kind": "efficiency",
                    "model": {"name": self.model, "path": model_path(self.model), "weights": "random"},
                    **method_identity(self.row),
                    "benchmark": {"name": "efficiency", "data": "shapes", "version": VERSION, "limit": None},
                    "prompt": f"{prompt['before']} + image + {prompt['after']} tokens",
                    "generation": {"max_new_tokens": tokens},
                    "seed": 0,
                    "regime": "predicted",
                    "hardware": {"predicted_for": asdict(card)},
                }
                labels = {"model": self.model, "method": self.row.label, "keep": self.row.keep}
                yield card, Cell.of(config, **labels, benchmark="efficiency", data="shapes")

    def is_done(self, store: Store) -> bool:
        """Whether every row is there, or the reason why there is none."""
        since = forced_since(self.settings["force"])
        records = [store.read(cell.id) for _, cell in self.cells()]
        return all(record is not None and begun(record) >= since for record in records)

    def store(self, store: Store, dense: SampleTrace) -> None:
        """Predict the rows and store them."""
        started = datetime.now(UTC)
        sample = self.trace(self.method)
        for card, cell in self.cells():
            tokens = cell.config["generation"]["max_new_tokens"]
            try:
                rows = predicted_rows(self.config, sample, dense, [tokens], card)
                done = result(rows.rows[tokens], [rows.trace], rows.config)
            except UserError as error:  # too little memory
                done = {"status": "failed", "error": describe(error)}
            seconds = (datetime.now(UTC) - started).total_seconds()
            store.write(new_record(cell, "efficiency", started, seconds, done))

    def refusals(self, store: Store) -> Iterator[str]:
        """One line per card that is too small."""
        for card in self.cards:
            records = [store.read(cell.id) for one, cell in self.cells() if one is card]
            if failed := [record for record in records if record and record["status"] == "failed"]:
                where = f"{self.model}, {neutral(self.row.label)}, {card.name}"
                yield f"{where}: does not fit ({failed[0]['error']['message']})."
