"""How long cells will take, from shapes and from what this machine has measured before; nothing here needs torch.

A cell's time is the roofline model's (arithmetic at peak rate, weights at peak bandwidth in decode) times a correction:
the median over earlier cells of what was measured over what the same formula says of them, of the same model and
benchmark where there are such cells, else of the same model, else of any. Without earlier cells there is no correction,
and the forecast is a lower bound that says so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from corematching import groups
from corematching.cost.shapes import Shapes
from corematching.evaluation import provenance
from corematching.evaluation.cells import Cell
from corematching.evaluation.dtypes import dtype_of
from corematching.evaluation.experiment import Experiment
from corematching.evaluation.matching import dropping_layer
from corematching.results.remote import folder_of_mirrors

_NEWEST = 400
"""Earlier cells that are read: enough for medians, and quick."""
_CORE_FLOPS, _BANDWIDTH = 5e10, 1.5e10
"""What is taken for a CPU core and for memory where nothing was measured."""
_PROMPT, _ANSWER = 60, 16
"""Text tokens of a question, and of an answer where no earlier cell of the benchmark says."""


@dataclass(frozen=True)
class Past:
    """An earlier accuracy cell on this machine."""

    model: str
    benchmark: str
    flops: float
    """Per question."""
    tokens: float
    """Per answer."""
    seconds: float
    """Per question."""


@dataclass(frozen=True)
class Forecast:
    """What is known of a model on this machine.

    Attributes
    ----------
    model
        Its configuration.
    shapes
        Its sizes; None if they are nowhere to be read.
    rate, bandwidth, source
        Peaks, and where they come from.
    past
        Earlier cells on this machine.
    batch_size
        Questions per forward pass.
    """

    model: Mapping[str, Any]
    shapes: Shapes | None
    rate: float
    bandwidth: float
    source: str
    past: tuple[Past, ...]
    batch_size: int = 1

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Forecast:
        """Read shapes, peaks and earlier cells for a configuration."""
        records = list(_records(folder_of_mirrors(settings["results_dir"])))
        shapes = _shapes(settings["model"])
        past = tuple(_past(record) for record in records if record["kind"] == "accuracy")
        return cls(settings["model"], shapes, *_peaks(records), past, settings["batch_size"])

    @cached_property
    def element(self) -> int:
        """Bytes per weight in the type that the model will be loaded in; nothing is measured to find out."""
        # Kept: every cell and every earlier one asks, and the answer rests on files of the system and of the cache.
        return 4 if dtype_of(self.model, measure=False) == "float32" else 2

    def tokens_by_layer(self, method: Mapping[str, Any], average: float | None = None) -> list[float]:
        """Visual tokens that enter each layer under a method's parameters; `average` if budgets are averages."""
        assert self.shapes is not None
        depth, everything = self.shapes.depth, float(self.model.get("visual_tokens") or 576)
        layer = dropping_layer(str(method["name"]), method, self.model)
        if layer is None:
            return [everything] * depth
        if average is not None:
            return [average if average > 1 else average * everything] * depth
        keep = method.get("keep")
        kept = everything / 4 if keep is None else float(keep) if isinstance(keep, int) else keep * everything
        return [everything if place < layer else min(kept, everything) for place in range(depth)]

    def question_seconds(self, benchmark: str, by_layer: list[float]) -> float:
        """Seconds per question, corrected by earlier cells."""
        assert self.shapes is not None
        rows = [_PROMPT + tokens for tokens in by_layer]
        flops = self.shapes.prefill_flops(rows)
        return self.correction(benchmark) * self._roofline(flops, self.answer_tokens(benchmark), rows)

    def _roofline(self, prefill_flops: float, tokens: float, rows: list[float]) -> float:
        assert self.shapes is not None
        step = max(
            self.shapes.step_flops(rows) / self.rate,
            self.shapes.decoder_weights * self.element / self.bandwidth / self.batch_size,
        )
        return prefill_flops / self.rate + max(tokens - 1, 0) * step

    def answer_seconds(self, by_layer: list[float], tokens: int) -> float:
        """Seconds for one answer of a forced length, without a correction."""
        assert self.shapes is not None
        rows = [_PROMPT + count for count in by_layer]
        return self._roofline(self.shapes.prefill_flops(rows), tokens, rows)

    def answer_tokens(self, benchmark: str) -> float:
        """Tokens per answer in earlier cells of the benchmark, else a guess."""
        known = [one.tokens for one in self.past if one.benchmark == benchmark]
        return median(known) if known else _ANSWER

    def alike(self, benchmark: str) -> list[Past]:
        """The earlier cells that say most about this benchmark."""
        same = [one for one in self.past if one.model == self.model["name"]]
        return [one for one in same if one.benchmark == benchmark] or same or list(self.past)

    def correction(self, benchmark: str) -> float:
        """Measured over roofline, the median over earlier cells; 1 without any."""
        ratios = [
            one.seconds / expected
            for one in self.alike(benchmark)
            if (expected := self._of_past(one)) > 0 and one.seconds > 0
        ]
        return median(ratios) if ratios else 1.0

    def _of_past(self, one: Past) -> float:
        if one.model != self.model["name"] or self.shapes is None:
            return one.flops / self.rate
        reading = self.shapes.decoder_weights * self.element / self.bandwidth / self.batch_size
        return one.flops / self.rate + max(one.tokens - 1, 0) * reading

    def cell_seconds(self, cell: Cell, questions: int, average: bool = False) -> float:
        """Seconds for a whole cell; 0 where nothing is known of the model."""
        if self.shapes is None:
            return 0.0
        keep = cell.label["keep"] if average else None
        by_layer = self.tokens_by_layer(cell.config["method"], keep)
        return questions * self.question_seconds(cell.label["benchmark"], by_layer)


def cell_weights(experiment: Experiment, cells: Sequence[Cell]) -> dict[Cell, float]:
    """How long cells take, for bars: seconds, or nothing where the model's sizes are not known."""
    forecast, questions = Forecast.of(experiment.settings), questions_of(experiment)
    average = experiment.settings["match"] == "average"
    return {cell: forecast.cell_seconds(cell, questions[cell.label["benchmark"]], average) for cell in cells}


def questions_of(experiment: Experiment) -> dict[str, int]:
    """Questions per cell of each benchmark."""
    settings = experiment.settings
    whole = {
        one.name: settings["data"]["n"] if settings["data"]["name"] == "mini" else one.questions
        for one in experiment.benchmarks
    }
    return {name: min(count, settings["limit"] or count) for name, count in whole.items()}


def _records(results_dir: Path) -> Iterator[dict[str, Any]]:
    """The newest finished cells of this machine, of whatever experiment."""
    found = []
    for path in results_dir.glob("*/cells/*/cell.json"):
        try:
            found.append((path.stat().st_mtime, path))
        except OSError:
            continue
    here = provenance.hardware()
    for _, path in sorted(found, reverse=True)[:_NEWEST]:
        try:
            record = json.loads(path.read_bytes())
            own = record["provenance"]["hardware"]
            if record["status"] == "done" and all(own.get(name) == here[name] for name in ("cpu", "gpu")):
                yield record
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue


def _past(record: Mapping[str, Any]) -> Past:
    trace, n = record.get("trace") or {}, max(record.get("n") or 0, 1)
    return Past(
        str(record["config"]["model"]["name"]),
        str(record["config"]["benchmark"]["name"]),
        float((trace.get("flops") or {}).get("total") or 0.0),
        float(trace.get("generated_tokens") or 1.0),
        float((record.get("timing") or {}).get("seconds") or 0.0) / n,
    )


def _peaks(records: list[dict[str, Any]]) -> tuple[float, float, str]:
    """FLOP/s, bytes/s, and where they come from: measured, a data sheet, or a guess."""
    for record in records:
        measured = record["provenance"].get("peaks")
        if record["kind"] == "efficiency" and measured:
            return float(measured["flops"]), float(measured["bandwidth"]), "this machine's measured peaks"
    name = provenance.hardware()["gpu"] or ""
    for profile in groups.choices("hardware"):
        sheet = groups.load("hardware", profile)
        words = str(sheet["name"]).removeprefix("NVIDIA ").split()
        if sheet["flops"] and name and words[0] in name:
            return float(sheet["flops"]["float16"]), float(sheet["bandwidth"]), f"the data sheet of {sheet['name']}"
    cores = len(os.sched_getaffinity(0))
    return cores * _CORE_FLOPS, _BANDWIDTH, f"a guess for {cores} CPU cores"


def _shapes(model: Mapping[str, Any]) -> Shapes | None:
    """Sizes from the configuration, else from the model folder's ``config.json``."""
    config = model.get("architecture")
    if not config:
        folder = provenance.packaged_path(str(model["path"])) or Path(str(model["path"])).expanduser()
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
    slice_of = {"num_hidden_layers": model["num_layers"]} if model.get("num_layers") else {}
    text, image = {**(config.get("text_config") or {}), **slice_of}, model.get("image_patches")
    vision = config.get("vision_config") or {}
    shapes = Shapes({**config, "text_config": text, "vision_config": vision}, tuple(image) if image else None)
    try:
        shapes.prefill_flops([1.0] * shapes.depth)
        shapes.step_flops([1.0] * shapes.depth)
    except (KeyError, TypeError):
        return None  # a configuration that leaves sizes to its library's defaults
    return shapes
