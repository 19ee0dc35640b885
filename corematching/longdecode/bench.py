"""The long-decode road: ``python run.py +experiment=long_decode``.

Every method answers the same prompts of one to many pictures, and its decode steps are fed the dense model's answer:
so all of them are held to the same words, and agreement does not end at the first word that differs. Time is taken
apart from that, dense and method in turns. Cells go into the same store as other accuracy cells: a question is one
decoded token, its score whether the likeliest token is dense's, its clustering unit the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import pandas as pd
from omegaconf import DictConfig

import corematching as cm
from corematching.answering.generator import Answer
from corematching.benchmarks import load_source
from corematching.engine.preflight import check_methods
from corematching.errors import UserError
from corematching.evaluation import asks, provenance
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
from corematching.longdecode.figure import long_decode_figure
from corematching.longdecode.measure import Forced, chooses, dense_answer, forced, rows_of_steps, seconds_per_token
from corematching.longdecode.prompts import prompt_of
from corematching.longdecode.table import BENCHMARK, METRIC, long_decode_table
from corematching.models.families import family_of
from corematching.models.loading import load_config, model_path
from corematching.results.figures.canvas import save
from corematching.results.store import Store
from corematching.results.terminal import show

VERSION = "1"
"""Of how cells are measured."""
MOST_TEXT = 512
"""Tokens of a prompt that are not visual, at most."""


def run(config: DictConfig) -> int:
    """Measure what the store lacks; write and print table and figure.

    Returns
    -------
    int
        Exit status: 0 all cells have results, 1 some failed.

    Raises
    ------
    UserError
        For a wrong setting, or a method that does not fit the model or leaves its KV cache alone.
    """
    settings = read_settings(config)
    experiment = planned(settings)
    reader = Reader(settings)
    reader.check_methods(experiment)
    store = Store(experiment.folder)
    experiment.manifest.write(experiment.folder)
    pending = [cell for cell in experiment.cells if not finished(store.read(cell.id), experiment)]
    with Reporter(len(pending)) as reporter:
        for line in banner(settings, answers=False):
            reporter.say(line)
        reporter.say(f"{experiment.name}: {len(experiment.cells)} cells, {len(pending)} to run -> {experiment.folder}")
        for cell in pending:
            attempt([cell], experiment, reader, store, reporter)
        if pending and settings["report"]:
            publish_run(store.root, reporter.say, lambda make: None)
        return conclude(experiment, store, reporter)


def planned(settings: Mapping[str, Any]) -> Experiment:
    """One cell per method, budget, seed and number of pictures."""
    identity, asked = model_identity(settings["model"]), settings["decode"]
    rows = tuple(method_rows(settings))
    machine = provenance.hardware()
    cells = [
        Cell.of(
            {
                "model": identity,
                **method_identity(row),
                "benchmark": {
                    "name": f"{BENCHMARK}_{images}",
                    "data": "mini",
                    "version": VERSION,
                    "limit": asked["prompts"],
                },
                "prompt": f"{images} pictures, {asked['tokens']} tokens answered",
                "seed": settings["seed"],
                "hardware": machine,  # times are part of the result
            },
            model=model_label(identity),
            method=row.label,
            keep=row.keep,
            benchmark=f"{BENCHMARK}_{images}",
            data="mini",
        )
        for row in rows
        for images in dict.fromkeys(asked["images"])
    ]
    folder, since = asks.folder_of(settings), forced_since(settings["force"])
    data = load_source(**settings["data"])
    return Experiment(folder.name, folder, tuple(dict.fromkeys(cells)), rows, (), data, settings, since)


def conclude(experiment: Experiment, store: Store, reporter: Reporter) -> int:
    """Write and print the table, and write the figure; returns the exit status."""
    records = [(cell, store.read(cell.id)) for cell in experiment.cells]
    done = [
        {**record, "labels": cell.label}
        for cell, record in records
        if record is not None and record["status"] == "done"
    ]
    note = small_note(experiment.settings, answers=False)
    table = long_decode_table([(record, store.samples(record["id"])) for record in done], filter(None, [note]))
    table.write(store.root, BENCHMARK)
    show(table, reporter.console)
    figure = long_decode_figure(done)
    if figure is not None:
        save(figure, store.root / "figures", BENCHMARK)
    reporter.say(f"table: {store.root / f'{BENCHMARK}.md'}; figure: {store.root / 'figures' / f'{BENCHMARK}.png'}")
    if len(done) < len(records):
        reporter.say(f"{len(records) - len(done)} of {len(records)} cells failed: see {store.cells}/<id>/cell.json")
    return 1 if len(done) < len(records) else 0


class Reader:
    """Evaluates the cells; model, prompts and dense answers are made when they are first needed."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.tokens, self.prompts = settings["decode"]["tokens"], settings["decode"]["prompts"]
        self._loaded: tuple[Any, Any] | None = None
        self._spoken: dict[tuple[int, int], tuple[Any, Any]] = {}

    def _model_name(self) -> str:
        chosen = self.settings["model"]
        return chosen["name"] if chosen["weights"] == "random" else chosen["path"]

    def check_methods(self, experiment: Experiment) -> None:
        """Refuse methods that do not fit the model, before anything is written."""
        chosen = self.settings["model"]
        config = load_config(self._model_name(), chosen["weights"], chosen["num_layers"], chosen["revision"])
        methods = dict.fromkeys(build(cell) for cell in experiment.cells)
        check_methods(methods, config, model_path(self._model_name()))
        for method in methods:
            if method.name != "dense" and not chooses(method, config):
                raise UserError(f"{method.name} leaves the KV cache alone: long_decode compares methods that do not")

    def loaded(self) -> tuple[Any, Any]:
        """The model and its processor (None for random weights)."""
        if self._loaded is None:
            chosen = self.settings["model"]
            self._loaded = cm.load_model(
                self._model_name(),
                weights=chosen["weights"],
                dtype=None if chosen["dtype"] == "auto" else chosen["dtype"],
                device=None if chosen["device"] == "auto" else chosen["device"],
                num_layers=chosen["num_layers"],
                revision=chosen["revision"],
                seed=self.settings["seed"],
            )
        return self._loaded

    def spoken(self, images: int, number: int) -> tuple[Any, Any]:
        """A prompt and what the dense model answers to it."""
        if (images, number) not in self._spoken:
            model, processor = self.loaded()
            # Rotary positions have no end: a context beyond what the model was made for runs, and its table says so.
            text, family = model.config.text_config, family_of(model.config)
            needed = images * (family.geometry(model.config).image_tokens or 0) + MOST_TEXT + self.tokens
            text.max_position_embeddings = max(text.max_position_embeddings, needed)
            inputs = prompt_of(model, processor, images, number, self.settings["seed"], self.settings)
            self._spoken[images, number] = inputs, dense_answer(model, inputs, self.tokens)
        return self._spoken[images, number]

    def answered(self, cell: Cell) -> bool:
        """Never: cells of this road are computed one at a time."""
        return False

    def evaluate(self, cell: Cell, on_progress: Callable[[int, int], None]) -> tuple[dict[str, Any], pd.DataFrame]:
        """Run one cell; returns what its record holds of results, and one row per decoded token."""
        (model, _), method, dense = self.loaded(), build(cell), cm.build_method("dense")
        images = int(cell.config["benchmark"]["name"].rpartition("_")[2])
        found: list[Forced] = []
        seconds: list[float] = []
        dense_seconds: list[float] = []
        context: list[int] = []
        for number in range(self.prompts):
            inputs, spoken = self.spoken(images, number)
            context.append(inputs["input_ids"].shape[1])
            found.append(forced(model, method, inputs, spoken))
            order = [(dense, dense_seconds), (method, seconds)]
            for subject, taken in order if number % 2 == 0 else order[::-1]:
                taken.append(seconds_per_token(model, subject, inputs, self.tokens))
            on_progress(number + 1, self.prompts)
        samples = rows_of(found)
        answers = [Answer("", self.tokens, one.trace) for one in found]
        by_prompt = [rows_of_steps(one.trace) for one in found]
        means = {name: sum(one[name] for one in by_prompt) / len(by_prompt) for name in by_prompt[0]}
        paired = [before / own for before, own in zip(dense_seconds, seconds, strict=True)]
        metrics = {**means, "context": sum(context) / len(context), "decode_ms_per_token": 1e3 * median(seconds)}
        metrics |= {"dense_ms_per_token": 1e3 * median(dense_seconds), "decode_speedup": median(paired)}
        value = 100 * float(samples["score"].mean())
        record = {
            "status": "done",
            "score": {"metric": METRIC, "value": value, "scale": 100.0, "note": ""},
            "metrics": metrics,
            "n": len(samples),
            "trace": summarise(answers, model.config),
        }
        return record, samples


def rows_of(found: list[Forced]) -> pd.DataFrame:
    """One row per decoded token, in the columns of other benchmarks' questions."""
    rows = [
        {
            "doc_id": 0,
            "part": "",
            "unit": str(prompt),
            "question_id": f"{prompt}/{place}",
            "question": "",
            "prompt": "",
            "prediction": str(said),
            "target": str(target),
            "score": float(said == target),
            "retained_tokens": 0.0,
        }
        for prompt, one in enumerate(found)
        for place, (said, target) in enumerate(zip(one.said.tolist(), one.targets.tolist(), strict=True))
    ]
    return pd.DataFrame(rows).assign(doc_id=range(len(rows)))
