"""Compute a stored cell again from its own record, and say what differs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf, open_dict

from corematching import groups
from corematching.benchmarks import load_benchmark, load_source
from corematching.errors import UserError
from corematching.evaluation import provenance
from corematching.evaluation.cells import Cell, canonical_json
from corematching.evaluation.experiment import Experiment, model_identity
from corematching.evaluation.records import describe
from corematching.evaluation.settings import read_settings
from corematching.results.reading import SAMPLES, UnusableCell, read_cell
from corematching.results.store import plain

_EXAMPLES = 3


@dataclass
class Comparison:
    """A stored cell beside its second computation.

    Attributes
    ----------
    origin
        In what the two were made differently: weights, data, versions, machine. One line each.
    result
        In what they came out differently: status, score, trace, answers. One line each; empty if they are the same.
    """

    origin: list[str] = field(default_factory=list)
    result: list[str] = field(default_factory=list)


def compute_again(folder: Path, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Comparison:
    """Compute the cell in `folder` once more; nothing is stored.

    Raises
    ------
    UserError
        If the folder holds no intact cell, or one that cannot be made again here: a timing, or a cell whose model, data
        or judge this machine lacks.
    """
    try:
        record = read_cell(folder)
    except UnusableCell as reason:
        raise UserError(f"{folder} is no intact cell: {reason}") from None
    if record["kind"] != "accuracy":
        raise UserError(f"{folder} is a measurement of time: measure again with +experiment=efficiency")
    if "hardware" in record["config"]:
        raise UserError(f"{folder} holds times as well: measure again with +experiment=long_decode force=true")
    stored = pd.read_parquet(folder / SAMPLES) if record["checksums"]["samples"] else None
    cell = Cell.of(record["config"], **record["labels"])
    experiment, evaluator = _prepared(cell, record["provenance"].get("settings") or {})
    found = Comparison(list(_origin(record, experiment)))
    rows = None
    try:
        result, rows = evaluator.evaluate(cell, on_progress)
    except UserError:
        raise
    except Exception as error:  # a failure can be what the record tells of
        result = {"status": "failed", "error": describe(error)}
    found.result += _results(record, plain(result))
    if stored is not None and rows is not None:
        found.result += _answers(stored, rows)
    return found


def _prepared(cell: Cell, made: Mapping[str, Any]) -> tuple[Experiment, Any]:
    """An experiment of this one cell, and what evaluates it."""
    settings = settings_of(cell, made)
    benchmark, data = cell.config["benchmark"], load_source(**settings["data"])
    if settings.get("text"):
        from corematching.perplexity.bench import Reader
        from corematching.perplexity.text import read_text

        experiment = Experiment("again", Path(), (cell,), (), (), data, settings)
        return experiment, Reader(experiment, read_text(settings["text"]))
    from corematching.evaluation.evaluator import Evaluator  # torch and transformers, seconds to import

    experiment = Experiment("again", Path(), (cell,), (), (load_benchmark(benchmark["name"]),), data, settings)
    return experiment, Evaluator(experiment)


def settings_of(cell: Cell, made: Mapping[str, Any]) -> dict[str, Any]:
    """The whole configuration behind a cell: its own, what its record says of how it was made, else what is usual.

    Raises
    ------
    UserError
        If the cell is of a model, a data set or a judge that is no longer among those that can be chosen.
    """
    config = cell.config
    benchmark, model = config["benchmark"], config["model"]
    words = [f"model={groups.known('model', model['name'])}", "executor=local", "tracking=none"]
    words += [f"judge={groups.known('judge', benchmark.get('judge', 'none'))}"]
    if not made.get("text"):
        words += [f"data={groups.known('data', benchmark['data'])}"]
    with initialize_config_module("conf", version_base="1.3"):
        composed = compose("config", words)
    with open_dict(composed):
        composed.pop("method", None)
        composed.model.update({**model, "num_layers": model.get("num_layers"), "revision": composed.model.revision})
        if re.fullmatch(r"[0-9a-f]{40}", model["revision"]):  # of the Hub; others are digests of what is there
            composed.model.revision = model["revision"]
        for name in ("prompt", "image", "generation", "seed"):
            if name in config and not made.get("text"):
                composed[name] = config[name]
        composed.limit = benchmark.get("limit")
        composed.benchmarks = [] if made.get("text") else [benchmark["name"]]
        composed.runner = "text" if made.get("text") else "accuracy"
        composed.update(_settable(made, composed))
    return read_settings(composed)


def _settable(made: Mapping[str, Any], composed: DictConfig) -> dict[str, Any]:
    """What the record says of how the cell was made, in place of what is usual."""
    usual = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(usual, dict)
    return {
        name: {**(usual.get(name) or {}), **value} if isinstance(value, dict) else value for name, value in made.items()
    }


def _origin(record: Mapping[str, Any], experiment: Experiment) -> Iterator[str]:
    """In what the second computation is made differently."""
    (cell,) = experiment.cells
    config, made = cell.config, record["provenance"]
    here = model_identity(experiment.settings["model"])["revision"]
    if here != config["model"]["revision"]:
        yield f"weights: {config['model']['revision']} then, {here} now"
    then: dict[str, Any] = config.get("files", {})
    now: dict[str, Any] = dict(provenance.method_files(config["method"]))
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            yield f"{name}: {then.get(name)} then, {now.get(name)} now"
    for benchmark in experiment.benchmarks:
        version = experiment.source.version(benchmark)
        if version != config["benchmark"]["version"]:
            yield f"data: {config['benchmark']['version']} then, {version} now"
    now = {**provenance.versions(), "commit": provenance.git_commit(), **provenance.hardware()}
    then = {**made["versions"], "commit": made.get("git_commit"), **made["hardware"]}
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) != then.get(name):
            yield f"{name}: {then.get(name)} then, {now.get(name)} now"


def _results(record: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[str]:
    """In what status, numbers and trace differ, leaf by leaf."""
    for part in ("status", "n", "score", "metrics", "trace"):
        then, now = dict(_leaves(part, record.get(part))), dict(_leaves(part, result.get(part)))
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name):
                yield f"{name}: {then.get(name)} then, {now.get(name)} now"
    errors = [(one.get("error") or {}).get("message") for one in (record, result)]
    if errors[0] != errors[1]:
        yield f"error: {errors[0]} then, {errors[1]} now"


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}", item)
    elif value not in (None, {}, []):
        yield name, value


def _answers(stored: pd.DataFrame, rows: pd.DataFrame) -> Iterator[str]:
    """In what the rows of questions differ, column by column, with the first examples."""
    then, now = (frame.set_index("doc_id") for frame in (stored, rows))
    if list(then.index) != list(now.index):
        yield f"questions: {len(then)} then, {len(now)} now, {len(then.index.intersection(now.index))} of them the same"
        return
    for column in [name for name in then.columns if name in now.columns]:
        apart = [place for place in then.index if _text(then[column][place]) != _text(now[column][place])]
        if apart:
            shown = "; ".join(
                f"question {place}: {then[column][place]!r} then, {now[column][place]!r} now"
                for place in apart[:_EXAMPLES]
            )
            yield f"{column}: {len(apart)} of {len(then)} differ ({shown}{'; …' if len(apart) > _EXAMPLES else ''})"


def _text(value: Any) -> str:
    try:
        return canonical_json(plain(value.tolist() if hasattr(value, "tolist") else value))
    except (TypeError, ValueError):
        return str(value)
