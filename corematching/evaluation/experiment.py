"""From a composed configuration to the list of cells; every mistake that can be found without torch is found here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from corematching import groups
from corematching.answering.conversation import IMAGE_MODES, PROMPTS
from corematching.benchmarks import Benchmark, DataSource, load_benchmark, load_source
from corematching.benchmarks.spec import available_benchmarks
from corematching.errors import UserError
from corematching.evaluation import machine, provenance
from corematching.evaluation.cells import Cell
from corematching.evaluation.matching import MATCHED, Shape, matched_parameters
from corematching.registry import method_defaults

_ENTRY_KEYS = ("name", "label", "budgets", "with")


@dataclass(frozen=True)
class Row:
    """One method at one budget: a line of the table."""

    method: str
    label: str
    keep: Any
    """What the label says about the budget: a count, a fraction, or None where nothing was asked for."""
    parameters: Mapping[str, Any] = field(hash=False)


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


def plan(config: DictConfig) -> Experiment:
    """Check a configuration and lay out its cells.

    Raises
    ------
    UserError
        Names the first wrong value and what would be valid.
    """
    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    _check_settings(settings)
    benchmarks = tuple(load_benchmark(name) for name in _listed(settings, "benchmarks", available_benchmarks()))
    rows = method_rows(settings)
    model = model_identity(settings["model"])
    source = load_source(**settings["data"])
    cells = [
        _cell(settings, model, row, benchmark, source.version(benchmark)) for benchmark in benchmarks for row in rows
    ]
    folder = Path(settings["results_dir"]).expanduser() / settings["experiment"]
    return Experiment(
        settings["experiment"], folder, tuple(dict.fromkeys(cells)), tuple(rows), benchmarks, source, settings
    )


def method_rows(settings: Mapping[str, Any]) -> list[Row]:
    """The methods times their budgets.

    A listed method takes part in the sweep over ``keep`` if it has a parameter of that name and its entry does not set
    it. An entry may instead map each budget to the parameters that mean it (``budgets: {192: {dominant: 162, ...}}``),
    and may be composed with a second method (``with: {name: core_neurons, keep: 0.4}``).
    """
    budgets = settings["keep"] if isinstance(settings["keep"], list) else [settings["keep"]]
    for keep in budgets:
        check_keep("keep", keep, settings["model"].get("visual_tokens"))
    entries = settings["methods"] if isinstance(settings["methods"], list) else [settings["methods"]]
    if not entries:
        raise UserError(f"methods is empty; name one or more of {', '.join(groups.choices('method'))}")
    overrides = settings["model"].get("method_overrides") or {}
    shape = _matching_shape(settings)
    return [row for entry in entries for row in _entry_rows(entry, budgets, overrides, shape)]


def _matching_shape(settings: Mapping[str, Any]) -> Shape | None:
    """What matching on the average needs to know of the model; None where ``keep`` is taken as it is."""
    if settings.get("match", "keep") == "keep":
        return None
    if settings["match"] != "average":
        raise groups.unknown("match", settings["match"], ("keep", "average"))
    model = settings["model"]
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
    entry = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = entry.get("name")
    valid = groups.choices("method")
    if name not in valid:
        raise groups.unknown("method", name, valid)
    known = method_defaults(name)
    own = {key: value for key, value in entry.items() if key not in _ENTRY_KEYS}
    of_model = model_overrides.get(name) or {}
    for key in (*own, *of_model):
        if key not in known:
            raise groups.unknown(f"parameter of {name}", key, known)
    base = {**known, **of_model, **own}
    label = entry.get("label") or name
    if "with" in entry:
        (second,) = _entry_rows(entry["with"], [], model_overrides)
        base["with"] = {"name": second.method, **second.parameters}
        label = entry.get("label") or f"{name} + {second.label}"
    if "budgets" in entry:
        return [Row(name, label, keep, {**base, **_budget(entry, keep)}) for keep in budgets]
    if shape and name in MATCHED and "keep" not in own:
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


def model_identity(model: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a cell that says which model: weights are named by content or commit, never by place alone.

    Raises
    ------
    UserError
        If the weights are nowhere to be found or a setting is unknown.
    """
    if model["weights"] not in ("pretrained", "random"):
        raise groups.unknown("weights", model["weights"], ("pretrained", "random"))
    dtypes = ("auto", "float32", "bfloat16", "float16")
    if model["dtype"] not in dtypes:
        raise groups.unknown("dtype", model["dtype"], dtypes)
    on_gpu = machine.gpu_count() > 0 and not str(model["device"]).startswith("cpu")
    dtype = ("float16" if on_gpu else "float32") if model["dtype"] == "auto" else model["dtype"]
    identity = {
        "name": model["name"],
        "path": model["path"],
        "revision": provenance.model_revision(model),
        "dtype": dtype,
        "weights": model["weights"],
    }
    return identity | ({"num_layers": model["num_layers"]} if model["num_layers"] else {})


def model_label(identity: Mapping[str, Any]) -> str:
    """What tables call a model: its name, and what makes it another than the published one.

    Such as "llava_1_5_7b (4 layers, random weights)".
    """
    notes = [f"{identity['num_layers']} layers"] if identity.get("num_layers") else []
    notes += ["random weights"] if identity["weights"] == "random" else []
    return f"{identity['name']} ({', '.join(notes)})" if notes else str(identity["name"])


def _cell(settings: Mapping[str, Any], model: Mapping[str, Any], row: Row, benchmark: Benchmark, version: str) -> Cell:
    config = {
        "model": model,
        "method": {"name": row.method, **row.parameters},
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


def _listed(settings: Mapping[str, Any], key: str, valid: tuple[str, ...]) -> list[str]:
    """The names under `key`, once each, all valid."""
    names = settings[key] if isinstance(settings[key], list) else [settings[key]]
    if not names:
        raise UserError(f"{key} is empty; name one or more of {', '.join(valid)}")
    for name in names:
        if name not in valid:
            raise groups.unknown(key.rstrip("s"), name, valid)
    return list(dict.fromkeys(names))


def _check_settings(settings: Mapping[str, Any]) -> None:
    for key, valid in (("prompt", PROMPTS), ("image", IMAGE_MODES)):
        if settings[key] not in valid:
            raise groups.unknown(key, settings[key], valid)
    for key, value in (
        ("batch_size", settings["batch_size"]),
        ("limit", settings["limit"]),
        ("generation.max_new_tokens", settings["generation"]["max_new_tokens"]),
    ):
        if value is None and key != "batch_size":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{key}={value} is not valid: give a whole number of at least 1")
    if not isinstance(settings["seed"], int) or settings["seed"] < 0:
        raise UserError(f"seed={settings['seed']} is not valid: give a whole number of at least 0")
