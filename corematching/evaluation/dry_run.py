"""``dry_run=true``: what a command would compute, how long, and what it needs. Nothing is computed or fetched."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from corematching.benchmarks import hub
from corematching.errors import UserError
from corematching.evaluation import asks, machine
from corematching.evaluation.attempt import finished
from corematching.evaluation.banner import banner
from corematching.evaluation.experiment import NOT_FETCHED, Experiment, method_rows, model_identity, plan
from corematching.evaluation.forecast import Forecast, questions_of
from corematching.evaluation.progress import duration
from corematching.evaluation.settings import read_settings
from corematching.results.store import Store

_QUESTION_BYTES, _CELL_BYTES, _PAGE_BYTES = 400, 12_000, 8_000_000
"""What results take on the disk: a row of samples.parquet, a cell.json, figures and report."""


def dry_run(config: DictConfig) -> int:
    """Print what a composed configuration would do; returns the exit status.

    Raises
    ------
    UserError
        For a wrong setting.
    """
    settings = read_settings(config)
    for line in banner(settings, answers=settings["runner"] == "accuracy"):
        print(line)
    print("dry run: nothing is computed or fetched")
    own = {
        "efficiency": _efficiency_lines,
        "prediction": _prediction_lines,
        "text": _text_lines,
        "decode": _decode_lines,
    }.get(settings["runner"])
    for line in own(settings) if own else _accuracy_lines(config):
        print(line)
    return 0


def _accuracy_lines(config: DictConfig) -> Iterator[str]:
    experiment = plan(config, fetch=False)
    settings, forecast, questions = experiment.settings, Forecast.of(experiment.settings), questions_of(experiment)
    store = Store(experiment.folder) if (experiment.folder / "cells").is_dir() else None
    done = {cell for cell in experiment.cells if store and finished(store.read(cell.id), experiment)}
    pending = [cell for cell in experiment.cells if cell not in done]
    yield (
        f"{experiment.name}: {len(experiment.cells)} cells on {settings['model']['name']} with"
        f" {settings['data']['name']} data, {len(done)} done, {len(pending)} to do -> {experiment.folder}"
    )
    average = settings["match"] == "average"
    total = 0.0
    for benchmark in experiment.benchmarks:
        own = [cell for cell in pending if cell.label["benchmark"] == benchmark.name]
        seconds = sum(forecast.cell_seconds(cell, questions[benchmark.name], average) for cell in own)
        total += seconds
        each = f"{questions[benchmark.name]:,} questions each"
        yield f"  {benchmark.name}: {len(own)} cells to do, {each}, {_time(seconds)}"
    asked = sum(questions[cell.label["benchmark"]] for cell in pending)
    yield f"questions: {asked:,}"
    yield f"time: {_time(total)} ({_basis(forecast, experiment)})"
    yield f"memory: {_memory(forecast)}"
    space = len(pending) * _CELL_BYTES + asked * _QUESTION_BYTES + (_PAGE_BYTES if settings["report"] else 0)
    yield f"disk: about {_bytes(space)} of results; {_bytes(_free(experiment.folder))} free"
    yield f"to download: {'; '.join(_downloads(experiment)) or 'nothing'}"


def _text_lines(settings: Mapping[str, Any]) -> Iterator[str]:
    folder, cells, text = asks.folder_of(settings), len(method_rows(settings)), settings["text"]
    yield f"{folder.name}: {cells} cells on {settings['model']['name']} with {text['title']} -> {folder}"
    yield f"tokens: {cells * text['windows'] * (text['context'] + text['tokens']):,} to run, done cells included"
    yield f"disk: {_bytes(_free(folder))} free"
    yield "to download: nothing; model and text are installed by make smol"


def _decode_lines(settings: Mapping[str, Any]) -> Iterator[str]:
    folder, cells, asked = asks.folder_of(settings), len(method_rows(settings)), settings["decode"]
    lengths = list(dict.fromkeys(asked["images"]))
    yield f"{folder.name}: {cells * len(lengths)} cells on {settings['model']['name']} -> {folder}"
    each = f"{asked['prompts']} prompts of {', '.join(map(str, lengths))} pictures, {asked['tokens']} tokens answered"
    yield f"each method: {each}; dense and method in turns"
    yield f"disk: {_bytes(_free(folder))} free"


def _prediction_lines(settings: Mapping[str, Any]) -> Iterator[str]:
    from corematching.efficiency.prediction import outlook  # with torch: cells are planned from configurations

    folder, (planned, pending) = asks.folder_of(settings), outlook(settings)
    yield f"{folder.name}: {planned} pairs of model and method, {pending} to predict, nothing to measure -> {folder}"
    yield f"disk: {_bytes(_free(folder))} free"
    yield "to download: nothing; predictions are made from shapes"


def _efficiency_lines(settings: Mapping[str, Any]) -> Iterator[str]:
    folder, rows = asks.folder_of(settings), method_rows(settings)
    lengths, batches = (list(dict.fromkeys(settings["efficiency"][name])) for name in ("output_tokens", "batch"))
    store = Store(folder) if (folder / "cells").is_dir() else None
    stored = {
        (record["labels"]["method"], record["labels"]["keep"], *_size(record["bench"]))
        for record in (store.records() if store else ())
        if record["status"] == "done" and record.get("bench") and not record["bench"]["predicted"]
    }
    sizes = [(batch, length) for batch in batches for length in lengths]
    pending = [row for row in rows if any((row.label, row.keep, *one) not in stored for one in sizes)]
    at = f"{len(lengths)} output lengths" + ("" if batches == [1] else f" and {len(batches)} batch sizes")
    yield f"{folder.name}: {len(rows)} methods at {at}, {len(pending)} to measure -> {folder}"
    forecast = Forecast.of({**settings, "batch_size": 1})
    if forecast.shapes is not None:
        pairs = settings["efficiency"]["repeats"] + 1  # one warm-up
        seconds = 0.0
        for row in pending:
            by_layer = forecast.tokens_by_layer({"name": row.method, **row.parameters})
            for batch in batches:
                together = replace(forecast, batch_size=batch)
                seconds += 2 * pairs * batch * together.answer_seconds(by_layer, max(lengths))
        yield f"time: {_time(seconds)} or more (roofline of {forecast.source}; dense and method by turns)"
    yield f"memory: {_memory(forecast)}"
    space = len(pending) * len(sizes) * _CELL_BYTES + _PAGE_BYTES
    yield f"disk: about {_bytes(space)} of results; {_bytes(_free(folder))} free"
    if settings["model"]["weights"] != "random" and (model := _model_download(settings)):
        yield f"to download: {model}"


def _size(bench: Mapping[str, Any]) -> tuple[int, int]:
    """Batch size and output length of a row."""
    return int(bench.get("batch") or 1), bench["output_tokens"]


def _basis(forecast: Forecast, experiment: Experiment) -> str:
    """What the time rests on."""
    if forecast.shapes is None:
        return "the model's sizes are not known before it is there"
    used = {one for benchmark in experiment.benchmarks for one in forecast.alike(benchmark.name)}
    if not used:
        return f"roofline of {forecast.source}; nothing was measured here yet, so it will be longer"
    factors = [forecast.correction(benchmark.name) for benchmark in experiment.benchmarks]
    span = f"{min(factors):.3g}" if len(set(factors)) == 1 else f"{min(factors):.3g} to {max(factors):.3g}"
    return f"roofline of {forecast.source} times {span}, from {len(used)} earlier cells on this machine"


def _memory(forecast: Forecast) -> str:
    """Weights and KV cache of a full batch of dense prompts."""
    if forecast.shapes is None:
        return "not known before the model is there"
    weights = forecast.shapes.weights * forecast.element
    rows = (forecast.model.get("visual_tokens") or 576) + 200
    cache = forecast.batch_size * rows * forecast.shapes.depth * forecast.shapes.kv_row * forecast.element
    batch = f"at batch size {forecast.batch_size}"
    return f"about {_bytes(weights)} of weights, {_bytes(cache)} of KV cache {batch}, and activations"


def _downloads(experiment: Experiment) -> Iterator[str]:
    if (model := _model_download(experiment.settings)) is not None:
        yield model
    if experiment.settings["data"]["name"] != "hub":
        return
    for benchmark in experiment.benchmarks:
        repo = hub.dataset_repo(benchmark, experiment.source.revision)
        if hub.cached(repo) is None:
            yield _sized(repo)


def _model_download(settings: Mapping[str, Any]) -> str | None:
    chosen = settings["model"]
    if model_identity(chosen, fetch=False)["revision"] != NOT_FETCHED:
        return None
    return _sized(hub.Repo("model", str(chosen["path"]), ("*.json", "*.safetensors", "*.model"), chosen["revision"]))


def _sized(repo: hub.Repo) -> str:
    """A repository with what is still to come of it, if the Hub can be asked."""
    if not machine.hub_reachable():
        return f"{repo.kind} {repo.id} (size unknown: the Hub cannot be reached)"
    try:
        return f"{repo.kind} {repo.id} ({hub.gigabytes(hub.plan(repo).bytes_missing)})"
    except UserError as error:
        return f"{repo.kind} {repo.id} (size unknown: {error})"


def _free(folder: Path) -> float:
    """Free bytes where a folder is or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return float(shutil.disk_usage(folder).free)


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def _time(seconds: float) -> str:
    return f"about {duration(seconds)}" if seconds > 0 else "no time"
