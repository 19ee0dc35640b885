"""The text road: ``python run.py +experiment=real_language_model`` measures methods by the text that follows a context.

Cells go into the same store as other accuracy cells: a question is one decoded token, its score whether the likeliest
token is the text's, its clustering unit the window. Perplexity stands in the cell's metrics and in ``perplexity.md``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig

from corematching.answering.generator import Answer
from corematching.evaluation import one_by_one
from corematching.evaluation.cells import Cell
from corematching.evaluation.chosen import place_of
from corematching.evaluation.evaluator import build
from corematching.evaluation.experiment import Experiment, method_rows, model_identity
from corematching.evaluation.settings import read_settings
from corematching.evaluation.trace_summary import summarise
from corematching.models.assembled import tokenizer_of
from corematching.models.loading import model_path
from corematching.perplexity.forced import Forced, force
from corematching.perplexity.table import BENCHMARK, METRIC, perplexity_table
from corematching.perplexity.text import Protocol, read_text, windows_of
from corematching.results.table import RunTable


def run(config: DictConfig) -> int:
    """Measure what the store lacks and print the table (see `corematching.evaluation.one_by_one.run`).

    Raises
    ------
    UserError
        For a wrong setting, a method that does not fit the model, or a model or text that is not installed.
    """
    settings = read_settings(config)
    text = read_text(settings["text"])
    return one_by_one.run(Reader(planned(settings, text), text))


def planned(settings: Mapping[str, Any], text: str) -> Experiment:
    """One cell per method, budget and seed; a cell's identity holds the text's digest."""
    identity, source, rows = model_identity(settings["model"]), settings["text"], method_rows(settings)
    version = hashlib.sha256(text.encode()).hexdigest()[:16]
    benchmark = {"name": BENCHMARK, "data": source["package"], "version": version, "limit": source["windows"]}
    prompt = f"{source['context']} tokens of context, {source['tokens']} decoded"
    cells = [one_by_one.cell_of(identity, row, benchmark, prompt, settings["seed"], source["title"]) for row in rows]
    return one_by_one.experiment_of(settings, rows, cells)


class Reader(one_by_one.Reader):
    """Evaluates the cells of a text experiment; the text is cut into windows at the first one."""

    name = "perplexity"

    def __init__(self, experiment: Experiment, text: str) -> None:
        super().__init__(experiment)
        source = self.settings["text"]
        self.text, self.protocol = text, Protocol(source["windows"], source["context"], source["tokens"])

    @cached_property
    def windows(self) -> list[list[int]]:
        """Token ids of the windows."""
        ids = tokenizer_of(model_path(place_of(self.settings["model"])))(self.text).input_ids
        return windows_of(ids, self.protocol)

    def table(self, cells: Sequence[one_by_one.Read], told: Iterable[str]) -> RunTable:
        return perplexity_table(cells, told)

    def evaluate(self, cell: Cell, on_progress: Callable[[int, int], None]) -> tuple[dict[str, Any], pd.DataFrame]:
        """Run one cell; returns what its record holds of results, and one row per decoded token."""
        windows, (model, _), method, found = self.windows, self.loaded(), build(cell), []
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
        {**one_by_one.token_row(window, place, said, target), "nll": nll}
        for window, one in enumerate(found)
        for place, (said, target, nll) in enumerate(
            zip(one.said.tolist(), one.targets.tolist(), one.nll.tolist(), strict=True)
        )
    ]
    return pd.DataFrame(rows).assign(doc_id=range(len(rows)))
