"""From a composed configuration to the list of cells; every mistake that can be found without torch is found here."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from corematching.benchmarks import Benchmark, DataSource, load_benchmark, load_source
from corematching.errors import UserError
from corematching.evaluation import asks, machine, provenance
from corematching.evaluation.cells import Cell, canonical_json
from corematching.evaluation.dtypes import dtype_of
from corematching.evaluation.matching import MATCHED, Shape, matched_parameters
from corematching.evaluation.settings import read_settings
from corematching.registry import build_method, method_defaults
from corematching.results.manifest import Manifest
from corematching.results.order import line_order
from corematching.results.titles import benchmark_order
from corematching.texts import neutral

NOT_FETCHED = "not fetched"
"""Version of data, or revision of a model, that a dry run does not find on this machine."""
_ENTRY_KEYS = ("name", "label", "budgets", "with", "seeds")


@dataclass(frozen=True)
class Row:
    """One method at one budget: a line of the table."""

    method: str
    label: str
    keep: Any
    """What the label says about the budget: a count, a fraction, or None where nothing was asked for."""
    parameters: Mapping[str, Any] = field(hash=False)
    seed: int | None = None
    """Of an entry with several ``seeds``, whose rows share a line."""


@dataclass(frozen=True)
class Experiment:
    """Everything a run needs to know, checked.

    `cells` are ordered by benchmark, then as the methods were listed, without duplicates.
    """

    name: str
    folder: Path
    cells: tuple[Cell, ...]
    rows: tuple[Row, ...]
    benchmarks: tuple[Benchmark, ...]
    source: DataSource
    settings: Mapping[str, Any]
    """The whole configuration as plain values."""
    since: float = 0.0
    """Finished cells count only if they were begun at or after this time (seconds since 1970; see ``force``)."""

    @property
    def mine(self) -> tuple[Cell, ...]:
        """The cells of this shard (``shard``, ``shards``; else all): neighbours, so that it has few benchmarks."""
        shard, shards = self.settings.get("shard"), self.settings.get("shards") or 1
        if shard is None:
            return self.cells
        count = len(self.cells)
        return self.cells[count * shard // shards : count * (shard + 1) // shards]

    @property
    def manifest(self) -> Manifest:
        """What the experiment's folder says of it."""
        labels = {cell.id: [cell.label["method"], cell.label["keep"]] for cell in self.cells}
        return Manifest(asks.ask_of(self.settings), [[row.label, row.keep] for row in self.rows], labels)


def plan(config: DictConfig, fetch: bool = True) -> Experiment:
    """Check a configuration and lay out its cells.

    Parameters
    ----------
    config
        As Hydra composed it and `corematching.cli.settle` settled it.
    fetch
        Whether data may be made or fetched; else what is not here is named `NOT_FETCHED`, and no cell of it is done.

    Raises
    ------
    UserError
        Names the first wrong value and what would be valid.
    """
    settings = read_settings(config)
    benchmarks = tuple(load_benchmark(name) for name in benchmark_order(settings["benchmarks"]))
    rows = method_rows(settings)
    model = model_identity(settings["model"], fetch)
    source = load_source(**settings["data"])
    versions = {
        one.name: source.version(one) if fetch else source.version_at_hand(one) or NOT_FETCHED for one in benchmarks
    }
    methods = [(row, method_identity(row)) for row in rows]  # once: files of methods are read for it
    cells = [
        _cell(settings, model, row, method, one, versions[one.name]) for one in benchmarks for row, method in methods
    ]
    folder = asks.folder_of(settings)
    return Experiment(
        folder.name,
        folder,
        tuple(dict.fromkeys(cells)),
        tuple(rows),
        benchmarks,
        source,
        settings,
        forced_since(settings["force"]),
    )


def forced_since(force: bool | float) -> float:
    """From which time on finished cells count: always (``force=false``), from now on (``true``), from a given time."""
    return float(math.floor(time.time())) if force is True else float(force)


def method_rows(settings: Mapping[str, Any]) -> list[Row]:
    """The methods times their budgets.

    A listed method takes part in the sweep over ``keep`` if it has a parameter of that name and its entry does not set
    it. An entry may instead map each budget to the parameters that mean it (``budgets: {192: {dominant: 162, ...}}``),
    and may be composed with a second method (``with: {name: core_neurons, keep: 0.4}``). ``seeds: [0, 1, 2]`` runs an
    entry once per seed; those rows share a line of the table.

    Returns
    -------
    Dense first, then budget by budget, each in the order of ``methods``: the order of every table.
    """
    budgets = settings["keep"]
    any_size = settings["model"].get("image_size") is not None  # every image has its own number of tokens
    for keep in budgets:
        check_keep("keep", keep, None if any_size else settings["model"].get("visual_tokens"))
    overrides = settings["model"].get("method_overrides") or {}
    shape = _matching_shape(settings)
    rows = [row for entry in settings["methods"] for row in _entry_rows(entry, budgets, overrides, shape)]
    return sorted(_distinct(rows), key=lambda row: line_order(row.method, row.keep))


def _distinct(rows: list[Row]) -> list[Row]:
    """The rows, each once.

    Raises
    ------
    UserError
        If two different ones would share a line of the table; names both.
    """
    lines: dict[tuple[str, Any, int | None], Row] = {}
    for row in rows:
        keep = float(row.keep) if isinstance(row.keep, int | float) else str(row.keep)  # 1 and 1.0 look alike
        first = lines.setdefault((neutral(row.label), keep, row.seed), row)
        if _content(first) != _content(row):
            both = f"{_described(first, row)} and {_described(row, first)}"
            raise UserError(f"two entries of methods are both called '{row.label}': {both}; give one another label")
    return list(lines.values())


def _content(row: Row) -> str:
    return canonical_json({"name": row.method, **row.parameters})


def _described(row: Row, other: Row) -> str:
    """A method, with those of its parameters that another row has not."""
    own = {name: value for name, value in row.parameters.items() if repr(value) != repr(other.parameters.get(name))}
    return f"{row.method} ({', '.join(f'{name}={value}' for name, value in own.items())})" if own else row.method


def _matching_shape(settings: Mapping[str, Any]) -> Shape | None:
    """What matching on the average needs to know of the model; None where ``keep`` is taken as it is."""
    if settings.get("match", "keep") == "keep":
        return None
    model = settings["model"]
    if model.get("image_size"):
        raise UserError(
            f"match=average needs images of one number of visual tokens, and those of {model['name']} have their own: "
            "use match=keep"
        )
    if not (model.get("visual_tokens") and model.get("layers") and model.get("vision_layers")):
        raise UserError(
            f"match=average needs visual_tokens, layers and vision_layers of model {model['name']}: "
            "add them to its configuration"
        )
    return Shape(model["visual_tokens"], model["num_layers"] or model["layers"], model["vision_layers"])


def _entry_rows(
    entry: Any, budgets: list[Any], model_overrides: Mapping[str, Mapping[str, Any]], shape: Shape | None = None
) -> list[Row]:
    """The rows of one entry of ``methods``; with a ``shape``, budgets are averages over its layers."""
    entry = {"name": entry} if isinstance(entry, str) else entry
    if entry.get("seeds"):
        alike = {key: value for key, value in entry.items() if key != "seeds"}
        seeded = [(seed, {**alike, "seed": seed}) for seed in entry["seeds"]]
        return [
            replace(row, seed=seed) for seed, one in seeded for row in _entry_rows(one, budgets, model_overrides, shape)
        ]
    name = entry["name"]
    known = method_defaults(name)
    own = {key: value for key, value in entry.items() if key not in _ENTRY_KEYS}
    of_model = model_overrides.get(name) or {}
    base = {**known, **of_model, **own}
    label = entry.get("label") or name
    if entry.get("with"):
        (second,) = _entry_rows(entry["with"], [], model_overrides)
        base["with"] = {"name": second.method, **second.parameters}
        label = entry.get("label") or f"{name} + {second.label}"
    if entry.get("budgets"):
        return [Row(name, label, keep, {**base, **_budget(entry, keep)}) for keep in budgets]
    if shape and name in MATCHED and "keep" not in own:
        build_method(name, **base)  # the rules compute with its parameters
        return [Row(name, label, keep, {**base, **matched_parameters(name, base, keep, shape)}) for keep in budgets]
    if "keep" not in known or "keep" in own or not budgets:
        return [Row(name, label, base.get("keep"), base)]
    if "threshold" in known and "threshold" not in own:
        base["threshold"] = "keep"  # a sweep asks for budgets, so methods that would adapt are held to them
    return [Row(name, label, keep, {**base, "keep": keep}) for keep in budgets]


def check_keep(name: str, keep: Any, tokens: int | None) -> None:
    """Refuse a budget that is no count of 1 to `tokens` and no fraction in (0, 1]."""
    count = isinstance(keep, int) and not isinstance(keep, bool)
    if count and 1 <= keep <= (tokens or keep):
        return
    if isinstance(keep, float) and 0 < keep <= 1:
        return
    counts = "a count of 1 or more" if tokens is None else f"a count from 1 to {tokens} (the model's visual tokens)"
    raise UserError(f"{name}={keep} is not valid: give {counts} or a kept fraction in (0, 1]")


def model_identity(model: Mapping[str, Any], fetch: bool = True) -> dict[str, Any]:
    """The part of a cell that says which model: weights are named by content or commit, never by place alone.

    Without `fetch`, a model of the Hub that is not cached is named `NOT_FETCHED`.

    Raises
    ------
    UserError
        If the weights are nowhere to be found, or the device is not there.
    """
    gpus = machine.gpu_count()
    if model["device"].startswith("cuda") and int(model["device"].partition(":")[2] or 0) >= gpus:
        there = f"GPUs 0 to {gpus - 1}" if gpus else "no GPU"
        raise UserError(f"model.device={model['device']} is not valid: this machine has {there}; give auto or cpu")
    identity = {
        "name": model["name"],
        "path": model["path"],
        "revision": provenance.model_revision(model) if fetch or provenance.at_hand(model) else NOT_FETCHED,
        "dtype": dtype_of(model, measure=fetch),
        "weights": model["weights"],
    }
    return identity | ({"num_layers": model["num_layers"]} if model["num_layers"] else {})


def method_identity(row: Row) -> dict[str, Any]:
    """The part of a cell that says which method; files that its parameters name are named by content as well."""
    method = {"name": row.method, **row.parameters}
    files = provenance.method_files(method)
    return {"method": method, **({"files": files} if files else {})}


def model_label(identity: Mapping[str, Any]) -> str:
    """What tables call a model: its name, and what makes it another than the published one.

    Such as "llava_1_5_7b (4 layers, random weights)".
    """
    notes = [f"{identity['num_layers']} layers"] if identity.get("num_layers") else []
    notes += ["random weights"] if identity["weights"] == "random" else []
    return f"{identity['name']} ({', '.join(notes)})" if notes else str(identity["name"])


def _cell(
    settings: Mapping[str, Any],
    model: Mapping[str, Any],
    row: Row,
    method: Mapping[str, Any],
    benchmark: Benchmark,
    version: str,
) -> Cell:
    config = {
        "model": model,
        **method,
        "benchmark": {
            "name": benchmark.name,
            "data": settings["data"]["name"],
            "version": version,
            "limit": settings["limit"],
            **({"judge": settings["judge"]["name"]} if benchmark.needs_judge else {}),
        },
        "prompt": settings["prompt"],
        "image": settings["image"],
        "generation": settings["generation"],
        "seed": settings["seed"],
    }
    return Cell.of(
        config,
        model=model_label(model),
        method=row.label,
        keep=row.keep,
        benchmark=benchmark.name,
        data=settings["data"]["name"],
    )


def _budget(entry: Mapping[str, Any], keep: Any) -> Mapping[str, Any]:
    if keep not in entry["budgets"]:
        known = ", ".join(str(key) for key in entry["budgets"])
        raise UserError(f"method {entry['name']} has no budget {keep} in this experiment; its budgets: {known}")
    return entry["budgets"][keep]
