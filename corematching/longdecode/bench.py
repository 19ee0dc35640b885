"""The long-decode road: ``python run.py +experiment=long_decode``.

Every method answers the same prompts of one to many pictures, and its decode steps are fed the dense model's answer:
so all of them are held to the same words, and agreement does not end at the first word that differs. Time is taken
apart from that, dense and method in turns. Cells go into the same store as other accuracy cells: a question is one
decoded token, its score whether the likeliest token is dense's, its clustering unit the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import pandas as pd
from omegaconf import DictConfig

import corematching as cm
from corematching.answering.generator import Answer
from corematching.evaluation import one_by_one, provenance
from corematching.evaluation.cells import Cell
from corematching.evaluation.evaluator import build
from corematching.evaluation.experiment import Experiment, method_rows, model_identity
from corematching.evaluation.settings import read_settings
from corematching.evaluation.trace_summary import summarise
from corematching.longdecode.figure import long_decode_figure
from corematching.longdecode.measure import Forced, chooses, dense_answer, forced, rows_of_steps, seconds_per_token
from corematching.longdecode.prompts import prompt_of
from corematching.longdecode.table import BENCHMARK, METRIC, long_decode_table
from corematching.models.families import family_of
from corematching.results.figures.canvas import ShownFigure
from corematching.results.table import RunTable

VERSION = "1"
"""Of how cells are measured."""
MOST_TEXT = 512
"""Tokens of a prompt that are not visual, at most."""


def run(config: DictConfig) -> int:
    """Measure what the store lacks; write and print table and figure (see `corematching.evaluation.one_by_one.run`).

    Raises
    ------
    UserError
        For a wrong setting, or a method that does not fit the model or leaves its KV cache alone.
    """
    return one_by_one.run(Reader(planned(read_settings(config))))


def planned(settings: Mapping[str, Any]) -> Experiment:
    """One cell per method, budget, seed and number of pictures."""
    identity, asked, rows = model_identity(settings["model"]), settings["decode"], method_rows(settings)
    machine = provenance.hardware()  # times are part of the result
    cells = []
    for row in rows:
        for images in dict.fromkeys(asked["images"]):
            benchmark = {"name": f"{BENCHMARK}_{images}", "data": "mini", "version": VERSION, "limit": asked["prompts"]}
            prompt = f"{images} pictures, {asked['tokens']} tokens answered"
            seed = settings["seed"]
            cells.append(one_by_one.cell_of(identity, row, benchmark, prompt, seed, "mini", hardware=machine))
    return one_by_one.experiment_of(settings, rows, cells)


class Reader(one_by_one.Reader):
    """Evaluates the cells; prompts and dense answers are made when they are first needed."""

    name = BENCHMARK

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        self.tokens, self.prompts = self.settings["decode"]["tokens"], self.settings["decode"]["prompts"]
        self._spoken: dict[tuple[int, int], tuple[Any, Any]] = {}

    def refusal(self, method: Any, config: Any) -> str | None:
        if method.name == "dense" or chooses(method, config):
            return None
        return f"{method.name} leaves the KV cache alone: long_decode compares methods that do not"

    def table(self, cells: Sequence[one_by_one.Read], told: Iterable[str]) -> RunTable:
        return long_decode_table(cells, told)

    def figure(self, records: Sequence[Mapping[str, Any]]) -> ShownFigure | None:
        return long_decode_figure(records)

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
        one_by_one.token_row(prompt, place, said, target)
        for prompt, one in enumerate(found)
        for place, (said, target) in enumerate(zip(one.said.tolist(), one.targets.tolist(), strict=True))
    ]
    return pd.DataFrame(rows).assign(doc_id=range(len(rows)))
