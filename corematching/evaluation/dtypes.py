"""Which type ``model.dtype=auto`` means on a processor: bfloat16 for large models where it is measured faster.

Nothing here imports torch unless the model is large and the processor says that it multiplies bfloat16.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from corematching import files
from corematching.cost.shapes import Shapes
from corematching.evaluation import machine

LARGE = 2e9
"""Weights of a decoder from which half the bytes decide; slices and small models stay in float32."""
_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""As the system lists them, x86's and Arm's."""
_TRIES = 5


def dtype_of(model: Mapping[str, Any], measure: bool = True) -> str:
    """The type that a model is loaded and computed in here: as asked, or what ``dtype: auto`` means.

    Parameters
    ----------
    model
        Its configuration.
    measure
        As in :func:`cpu_dtype`.
    """
    if model["dtype"] != "auto":
        return model["dtype"]
    on_gpu = machine.gpu_count() > 0 and model["device"] != "cpu"
    return model.get("released_in", "float16") if on_gpu else cpu_dtype(model, measure)


def cpu_dtype(model: Mapping[str, Any], measure: bool = True) -> str:
    """The type of a model's weights on this processor, for ``dtype: auto``.

    Parameters
    ----------
    model
        Its configuration; one without an ``architecture`` counts as small.
    measure
        Whether to measure what is not known yet; else that counts as slower.
    """
    architecture = model.get("architecture")
    if not architecture or not _FLAGS & _flags():
        return "float32"
    text = dict(architecture.get("text_config") or {})
    if not {"num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"} <= set(text):
        return "float32"
    text["num_hidden_layers"] = model.get("num_layers") or text["num_hidden_layers"]
    large = Shapes({**architecture, "text_config": text}).decoder_weights >= LARGE
    return "bfloat16" if large and bfloat16_is_faster(measure) else "float32"


def bfloat16_is_faster(measure: bool = True) -> bool:
    """Whether products and reads both take less time than in float32; measured once per machine and torch version."""
    path = files.cache_home() / "dtypes.json"
    key = f"{files.cpu_name()}, {len(os.sched_getaffinity(0))} cores, torch {version('torch')}"
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}
    if isinstance(known.get(key), bool) or not measure:
        return known.get(key) is True
    known[key] = all(half < full for half, full in zip(_seconds("bfloat16"), _seconds("float32"), strict=True))
    files.write(path, json.dumps(known, indent=1) + "\n")
    return known[key]


def _seconds(name: str) -> tuple[float, float]:
    """The shortest times of a matrix product as in prefill and of a matrix-vector product as in decode."""
    import torch

    dtype = getattr(torch, name)
    with torch.inference_mode():
        weight, tokens = torch.ones(4096, 4096, dtype=dtype), torch.ones(512, 4096, dtype=dtype)
        best = []
        for work in (lambda: tokens @ weight, lambda: weight @ tokens[0]):
            work()
            times = []
            for _ in range(_TRIES):
                start = time.perf_counter()
                work()
                times.append(time.perf_counter() - start)
            best.append(min(times))
    return best[0], best[1]


def _flags() -> set[str]:
    """What the system says that the processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())
