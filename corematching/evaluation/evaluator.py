"""Evaluates cells; holds what they share and what is slow to make: the model, a benchmark's tasks, the judge."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
import transformers

import corematching as cm
from corematching.answering.features import FeatureStore
from corematching.answering.generator import Answer, Generator
from corematching.answering.prompts import Question
from corematching.answering.recipes import recipe_of
from corematching.benchmarks.judge import Judge, judge_values, load_judge
from corematching.benchmarks.spec import ROW
from corematching.cost.memory import keep_freed_memory
from corematching.engine.preflight import check_methods
from corematching.errors import UserError
from corematching.evaluation.board import Offer
from corematching.evaluation.cells import Cell
from corematching.evaluation.experiment import Experiment
from corematching.evaluation.shards import OnDone, Shards
from corematching.evaluation.sheet import Sheet
from corematching.evaluation.trace_summary import check_acted, summarise
from corematching.files import cache_home
from corematching.models.loading import load_config, model_path


class _Helped(Exception):
    """Ends lmms-eval's evaluation where all there was to do is done."""

    def __init__(self, shards: int):
        self.shards = shards


class Evaluator:
    """Evaluates the cells of one experiment.

    The model is loaded at the first cell; a benchmark's tasks are built at its first cell and dropped at the next
    benchmark's. lmms-eval is imported no earlier, because that takes longer than most mistakes need to show.
    """

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.company: tuple[Cell, ...] = ()
        """Cells that are going to be evaluated one after the other and ask the same questions; set by whoever asks."""
        self.offer: Offer | None = None
        """Through which others help with the questions of these cells, if they do; set likewise."""
        self._sheet: tuple[tuple[Cell, ...], Sheet | None] = ((), None)
        self._generator: Generator | None = None
        self._tasks: tuple[str, Any] = ("", None)
        self._judge: Judge | None = None

    def check_methods(self, cells: Sequence[Cell]) -> None:
        """Find out, before any long work and before anything is written, what could only fail later.

        Every method is built and asked whether it fits the model; what it needs besides is looked for, and so is the
        judge's key.

        Raises
        ------
        UserError
            For the first that does not fit or is not there.
        """
        settings = self.experiment.settings
        chosen = settings["model"]
        methods = dict.fromkeys(build(cell) for cell in cells)
        config = load_config(chosen["path"], chosen["weights"], chosen["num_layers"], chosen["revision"])
        recipe_of(config).choose(
            config.model_type, self.experiment.settings["prompt"], self.experiment.settings["image"]
        )
        check_methods(methods, config, model_path(chosen["path"]))
        if any(benchmark.needs_judge for benchmark in self.experiment.benchmarks):
            judge_values(**settings["judge"])

    def prepare(self) -> None:
        """Load the model now, so that a checkpoint that is no good ends the run instead of failing every cell.

        Raises
        ------
        UserError
            If weights or processor cannot be loaded.
        """
        _ = self.generator

    @property
    def judge(self) -> Judge | None:
        """The judge as it was asked for; a bundled one is started at its first use."""
        if self._judge is None:
            self._judge = load_judge(**self.experiment.settings["judge"])
        return self._judge

    @property
    def generator(self) -> Generator:
        """The loaded model, ready to answer."""
        if self._generator is None:
            settings = self.experiment.settings
            chosen = settings["model"]
            transformers.utils.logging.disable_progress_bar()
            model, processor = cm.load_model(
                chosen["path"],
                weights=chosen["weights"],
                dtype=self.experiment.cells[0].config["model"]["dtype"],
                device=None if chosen["device"] == "auto" else chosen["device"],
                num_layers=chosen["num_layers"],
                revision=chosen["revision"],
            )
            if processor is None:
                raise UserError(f"model {chosen['name']} comes without a processor, which accuracy runs need")
            self._generator = Generator(
                model,
                processor,
                settings["prompt"],
                settings["image"],
                settings["batch_size"],
                features=feature_store(settings["features"], model.device),
            )
            if model.device.type == "cpu":
                keep_freed_memory()
        return self._generator

    def evaluate(self, cell: Cell, on_progress: Callable[[int, int], None]) -> tuple[dict[str, Any], pd.DataFrame]:
        """Run one cell.

        Returns
        -------
        dict
            The cell's record, as far as results go: status, score, metrics, n, trace, timing. Its
            ``seconds_of_others`` are those that passed here and belong to other cells (negative: they passed there).
        DataFrame
            One row per question, with the tokens retained and generated.

        Raises
        ------
        Exception
            Whatever generation or scoring raises.
        """
        from corematching.benchmarks.scoring import score
        from corematching.evaluation import harness
        from corematching.evaluation.lmms_model import CoreMatchingLMM

        config = cell.config
        tasks = self._tasks_of(config["benchmark"]["name"])
        identity = f"{config['model']['name']}, {config['model']['revision']}"
        company = self.company if cell in self.company else (cell,)
        sheet, number = self._sheet_of(company), company.index(cell)
        method, before = sheet.methods[number], sheet.seconds
        model = CoreMatchingLMM.wrap(self.generator, method, identity, sheet.column(number))
        model.on_progress = on_progress
        results = harness.evaluate(model, tasks, config["seed"])
        answers = list(model.answers.values())
        check_acted(method, answers)
        scored = score(self._benchmark(config["benchmark"]["name"]), results)
        record = {
            "status": "done" if scored.status == "scored" else "not_scored",
            "score": {"metric": scored.metric, "value": scored.value, "scale": scored.scale, "note": scored.note},
            "metrics": dict(scored.metrics),
            "n": len(scored.samples),
            "trace": summarise(answers, self.generator.model.config),
            "timing": {
                "model_seconds": model.shared.seconds,
                "cells_together": model.shared.cells,
                "seconds_of_others": sheet.seconds - before - model.shared.seconds,
            },
        }
        return record, with_traces(scored.samples, results, model.answers)

    def answered(self, cell: Cell) -> bool:
        """Whether a cell's questions were all answered together with another cell's: it only waits to be scored."""
        company, sheet = self._sheet
        return cell in company and company == self.company and sheet is not None and sheet.holds(company.index(cell))

    def help(self, company: Sequence[Cell], offer: Offer) -> int:
        """Answer questions of cells that another process holds and scores; returns how many shards."""
        from corematching.evaluation import harness
        from corematching.evaluation.lmms_model import CoreMatchingLMM

        methods, config = [build(cell) for cell in company], company[0].config

        def ask(questions: Sequence[Question], on_done: OnDone) -> Any:
            raise _Helped(Shards(offer).help(self.generator.answer_together, questions, methods))

        model = CoreMatchingLMM.wrap(self.generator, methods[0], "", ask)
        try:
            harness.evaluate(model, self._tasks_of(config["benchmark"]["name"]), config["seed"])
        except _Helped as helped:
            return helped.shards
        return 0

    def _sheet_of(self, company: tuple[Cell, ...]) -> Sheet:
        if self._sheet[0] != company or self._sheet[1] is None:
            answer = self.generator.answer_together
            lead = Shards(self.offer).lead(answer) if self.offer and company == self.company else None
            self._sheet = company, Sheet(self.generator, [build(cell) for cell in company], lead)
        return self._sheet[1]  # type: ignore[return-value]

    def _tasks_of(self, name: str) -> Any:
        from corematching.benchmarks.tasks import build_tasks

        if self._tasks[0] != name:
            settings = self.experiment.settings
            benchmark = self._benchmark(name)
            tasks = build_tasks(
                benchmark,
                self.experiment.source,
                settings["prompt"],
                settings["limit"],
                self.judge if benchmark.needs_judge else None,
                settings["generation"]["max_new_tokens"],
            )
            self._tasks = name, tasks
        return self._tasks[1]

    def _benchmark(self, name: str) -> Any:
        return next(benchmark for benchmark in self.experiment.benchmarks if benchmark.name == name)


def build(cell: Cell) -> Any:
    """The cell's method object; an entry's ``with`` is composed onto it."""
    parameters = cell.config["method"]
    second = parameters.pop("with", None)
    method = cm.build_method(parameters.pop("name"), **parameters)
    return cm.compose(method, cm.build_method(second.pop("name"), **second)) if second else method


def feature_store(asked: Mapping[str, Any], device: torch.device) -> FeatureStore | None:
    """Where states of the vision tower are kept, as configured; None if they are not.

    Left to itself (``auto``), on a CPU only; see `corematching.answering.features`.
    """
    wanted = device.type == "cpu" if asked["cache"] == "auto" else asked["cache"]
    return FeatureStore(cache_home() / "features", int(asked["most_gb"] * 1e9)) if wanted else None


def with_traces(
    samples: pd.DataFrame, results: Mapping[str, Any], answers: Mapping[tuple[str, int], Answer]
) -> pd.DataFrame:
    """Add to the per-question rows what really ran: visual tokens per layer and tokens generated.

    lmms-eval counts documents within a task; the rows are numbered over a benchmark's parts.
    """
    by_row = {
        int(sample["doc"][ROW]): answers[task, sample["doc_id"]]
        for task, logged in results["samples"].items()
        for sample in logged
    }
    found = [by_row[row] for row in samples["doc_id"]]
    return samples.assign(
        retained_tokens=[answer.trace.average_visual_tokens for answer in found],
        generated_tokens=[answer.tokens for answer in found],
        ended=[answer.ended for answer in found],
    )
