"""A synthetic store: cells and samples with known structure, in the layout of a real run.

Every question has a difficulty; a method answers right when a seeded draw falls below its skill, and shares the draw
with the dense model, so that cells are paired as real ones are. The tests and ``scripts/bench_aggregate.py`` build on
it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from corematching.results.reading import SCHEMA, digest
from corematching.results.seal import canonical_json, identity, sealed

LAYERS, TOKENS = 12, 576
SKILL = {"dense": 0.90, "random": 0.55, "uniform": 0.58, "fastv": 0.74, "core_tokens": 0.78, "corematching": 0.80}


def cell_config(
    method: str, keep: int | None, benchmark: str, n: int, *, model: str = "tiny", data: str = "mini", **extra
) -> dict:
    """The resolved config of one cell; ``extra`` adds method parameters."""
    parameters = {"name": method, **({"layer": 2, "keep": keep} if keep is not None else {}), **extra}
    return {
        "model": {
            "name": model,
            "path": f"models/{model}",
            "revision": "r1",
            "dtype": "float32",
            "weights": "pretrained",
        },
        "method": parameters,
        "benchmark": {"name": benchmark, "data": data, "version": "v1", "limit": n},
        "prompt": "llava15",
        "generation": {"max_new_tokens": 16},
        "seed": 0,
    }


def cell_id(config: dict) -> str:
    """The cell's name, as the store wants it."""
    return identity(canonical_json(config))


def trace_summary(keep: int | None) -> dict:
    """A trace summary in which the budget holds from layer 2 on."""
    kept = TOKENS if keep is None else keep
    by_layer = [float(TOKENS)] * 2 + [float(kept)] * (LAYERS - 2)
    prefill = 2e9 * (0.1 + 0.9 * kept / TOKENS)
    flops = {"vision": 4e8, "projector": 1e8, "prefill": prefill, "decode": 2e7, "lm_head": 1e6, "overhead": 1e5}
    return {
        "image_tokens": TOKENS,
        "tokens_entering_llm": float(TOKENS),
        "visual_tokens_per_layer": float(np.mean(by_layer)),
        "visual_tokens_by_layer": by_layer,
        "neurons_by_layer": [None] * 2 + [205.0] * (LAYERS - 2),
        "kv_bytes": int(3000 * np.mean(by_layer)),
        "dense_kv_bytes": 3000 * TOKENS,
        "generated_tokens": 1.5,
        "flops": {**flops, "total": sum(flops.values())},
        "flops_conventions": {"fastv_eq5": prefill / 2, "llama_3ndm": prefill / 1.7},
    }


def cell_record(
    config: dict, *, kind: str = "accuracy", status: str = "done", value: float | None = None, n: int = 0
) -> dict:
    """A complete ``cell.json``; scores are filled in by :func:`write_cell`."""
    method, benchmark = config["method"], config["benchmark"]
    done = status == "done"
    return {
        "schema": SCHEMA,
        "kind": kind,
        "id": cell_id(config),
        "status": status,
        "config": config,
        "labels": {
            "model": config["model"]["name"],
            "method": method.get("label", method["name"]),
            "keep": method.get("keep"),
            "benchmark": benchmark["name"],
            "data": benchmark["data"],
        },
        "metrics": {"exact_match": value / 100} if value is not None else {},
        "score": {
            "metric": "accuracy",
            "value": value,
            "scale": 100.0,
            "note": "" if done else "no judge is configured",
        },
        "n": n,
        "trace": trace_summary(method.get("keep")) if done else None,
        "timing": {"seconds": 3.2, "model_seconds": 3.0},
        "provenance": {
            "versions": {"torch": "2", "transformers": "5"},
            "git_commit": "0123456789abcdef",
            "hardware": {"cpu": "a cpu", "cores": 2, "gpu": None},
            "started": "2026-01-01T00:00:00+00:00",
            "finished": "2026-01-01T00:00:03+00:00",
        },
        "error": {"type": "RuntimeError", "message": "out of <memory> & time", "traceback": "..."}
        if status == "failed"
        else None,
        "bench": None,
    }


def samples_table(
    scores: np.ndarray, *, retained: float = 64.0, parts: Iterable[str] = ("",), per_unit: int = 1
) -> pa.Table:
    """Per-question rows for ``scores``; ``per_unit`` consecutive questions share a clustering unit."""
    n, names = len(scores), np.array(list(parts))
    index = np.arange(n)
    truth = np.where(index % 2 == 0, "yes", "no")
    wrong = np.where(index % 2 == 0, "no", "yes")
    return pa.table(
        {
            "doc_id": index,
            "part": names[np.arange(n) * len(names) // max(n, 1)],
            "unit": np.char.add("image-", (index // per_unit).astype(str)),
            "prompt": np.char.add("Is there a <b>disc</b> & a tile? #", index.astype(str)),
            "prediction": np.where(scores >= 0.5, truth, wrong),
            "target": truth,
            "score": scores.astype(np.float64),
            "retained_tokens": np.full(n, retained),
            "generated_tokens": np.full(n, 1.0),
        }
    )


def write_cell(experiment: Path, record: dict, samples: pa.Table | None = None) -> Path:
    """Write one cell folder of an experiment, sealed as the store seals it, and return it."""
    folder = experiment / "cells" / record["id"]
    folder.mkdir(parents=True, exist_ok=True)
    if samples is not None:
        pq.write_table(samples, folder / "samples.parquet")
    checksum = None if samples is None else digest(folder / "samples.parquet")
    (folder / "cell.json").write_text(json.dumps(sealed(record, checksum)), encoding="utf-8")
    return folder


def write_accuracy_cell(
    experiment: Path, config: dict, draws: np.ndarray, *, per_unit: int = 1, skill: float | None = None
) -> Path:
    """One finished accuracy cell whose answers come from ``draws`` (uniform in [0, 1), one per question)."""
    method, keep = config["method"]["name"], config["method"].get("keep")
    if skill is None:
        skill = SKILL[method] if keep is None else SKILL[method] - 0.03 * np.log2(192 / keep)
    scores = (draws < skill).astype(float)
    record = cell_record(config, value=100 * float(scores.mean()), n=len(draws))
    return write_cell(experiment, record, samples_table(scores, retained=float(keep or TOKENS), per_unit=per_unit))


def write_store(
    root: Path,
    *,
    methods: Iterable[str] = ("dense", "random", "fastv", "corematching"),
    keeps: Iterable[int] = (192, 64),
    benchmarks: Iterable[str] = ("gqa", "pope", "textvqa"),
    models: Iterable[str] = ("tiny",),
    n: int = 120,
    per_unit: int = 2,
    experiment: str = "sweep",
    data: str = "mini",
    seed: int = 0,
) -> Path:
    """A full sweep; the dense model has one cell per benchmark, every other method one per budget."""
    folder = root / experiment
    rng = np.random.default_rng(seed)
    for model in models:
        for benchmark in benchmarks:
            difficulty = rng.random(n)
            for method in methods:
                for keep in (None,) if method == "dense" else tuple(keeps):
                    noise = rng.random(n) < 0.1
                    draws = np.where(noise, rng.random(n), difficulty)
                    config = cell_config(method, keep, benchmark, n, model=model, data=data)
                    write_accuracy_cell(folder, config, draws, per_unit=per_unit)
    return folder


#: Labels that a table, a figure or a page must survive; the first is longer than any line.
UGLY = (
    "a method whose label says everything about its parameters, rho=0.2, beta=0.4, threshold=elbow, layer=2 of 32",
    "a method whose label says everything about its parameters, rho=0.2, beta=0.4, threshold=keep!, layer=2 of 32",
    *("_hidden_", "50 % [kept] | $x_1$ & co", "a\\b {c} ~d^e #1", "<b>bold</b>", "שיטה חדשה", "طريقة 2", "方法 ρ→β"),
    *("no_break_" * 8, "🚀 fast", "tab\tand\nline"),
)


def write_ugly_store(
    root: Path,
    *,
    methods: int = 30,
    benchmarks: Iterable[str] = (
        *("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench", "seedbench", "mmvet"),
    ),
    keeps: Iterable[int] = (320, 192, 128, 64, 16),
    n: int = 16,
) -> Path:
    """A sweep of many methods with ugly names (see :data:`UGLY`), with efficiency rows of some of them.

    One cell has failed and one method has no sample rows, so that there are holes and points without an interval.
    """
    folder, rng = root / "ugly", np.random.default_rng(1)
    labels = [*UGLY, *(f"method {place}" for place in range(methods))][: methods - 2]
    rows = [("dense", None, "dense"), *(("random", keep, "random") for keep in keeps)]
    rows += [("fastv", keep, label) for label in labels for keep in keeps]
    for benchmark in benchmarks:
        draws = rng.random(n)
        for name, keep, label in rows:
            config = cell_config(name, keep, benchmark, n, **({} if name == label else {"label": label}))
            if (label, keep, benchmark) == (UGLY[2], 64, "gqa"):
                write_cell(folder, cell_record(config, status="failed"))
            elif label == UGLY[3]:
                write_cell(folder, cell_record(config, value=100 * rng.random(), n=n))
            else:
                noisy = np.where(rng.random(n) < 0.2, rng.random(n), draws)
                write_accuracy_cell(folder, config, noisy)
    for label in ("dense", *labels[:10]):
        times = {"prefill_ms": 90.0 * rng.random(), "decode_ms_per_token": 3.0, "end_to_end_ms": 200.0, "repeats": 3}
        times |= {"prefill_ms_iqr": 2.0, "end_to_end_ms_iqr": 4.0, "decode_gb_per_s": 20.0, "paired_speedup_iqr": 0.1}
        named = {} if label == "dense" else {"label": label}
        for name, keep in (("core_neurons", 0.4), ("fastv", 64), ("fastv", 16)) if named else (("dense", None),):
            write_efficiency_cell(folder, name, keep, model="tiny", named=named, **times)
    return folder


def write_efficiency_cell(
    experiment: Path,
    method: str,
    keep: float | None,
    *,
    model: str = "llava_1_5_7b",
    output_tokens: int = 32,
    named: dict | None = None,
    **row,
) -> Path:
    """One row of the efficiency road; ``named`` may hold its ``label``."""
    extra = {"output_tokens": output_tokens, **(named or {})}
    config = cell_config(method, keep, "efficiency", 0, model=model, data="none", **extra)
    record = cell_record({**config, "kind": "efficiency"}, kind="efficiency")
    usual = {"device": "a cpu", "regime": "resident", "predicted": False}
    record["bench"] = {**usual, "output_tokens": output_tokens, **row}
    return write_cell(experiment, record)
