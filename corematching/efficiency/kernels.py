"""A few kernels of a model's shapes, measured once per machine and kept: what the calibrated prediction rests on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from corematching import files
from corematching.cost.calibration import Calibration, Layer
from corematching.cost.hardware import dtype_name
from corematching.cost.shapes import vision_layer_flops
from corematching.cost.towers import tower_of
from corematching.efficiency.latency import timed
from corematching.engine.ffn import neuron_major, sliceable
from corematching.engine.ways import decide, measured
from corematching.models.families import family_of, head_width

ROWS = (1, 8, 64, 160, 352, 704)
"""Numbers of rows at which a decoder layer's parts are measured."""
VISION_ROWS = (64, 577)
TURNS = 3
KEEP = 0.4
"""Kept share of the neurons at which their rows are timed."""


def calibration_of(model: Any, again: bool = False) -> Calibration:
    """Measure a model's shapes on its device, a few seconds; from an earlier process where one did.

    Parameters
    ----------
    again
        Measure even if it is known.
    """
    path, key = files.cache_home() / "kernels.json", _key(model)
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8")))
        if not again and key in known:
            return _read(known[key])
    except (OSError, ValueError, TypeError, KeyError):
        known = {}
    found = measure(model)
    known[key] = asdict(found)
    files.write(path, json.dumps(known, indent=1) + "\n")
    return found


def _read(stored: dict[str, Any]) -> Calibration:
    layers = {part: Layer(**{name: tuple(values) for name, values in stored[part].items()}) for part in _PARTS}
    return Calibration(**{**stored, **layers})


_PARTS = ("text", "vision")


def _key(model: Any) -> str:
    text, tower, device = model.config.text_config, tower_of(model.config.to_dict()), model.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else files.cpu_name()
    shape = f"{text.hidden_size} x {text.intermediate_size}, {_heads(text)}, {text.vocab_size}"
    return (
        f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype_name(model.dtype)}, {shape},"
        f" {tower.width} x {tower.ffn}"
    )


def measure(model: Any) -> Calibration:
    """Time the kernels; random numbers, the model's own first FFN for chosen neurons (unchanged afterwards)."""
    text, tower = model.config.text_config, tower_of(model.config.to_dict())
    heads, pairs, size = _heads(text)
    vision_heads = _vision_heads(model.config.vision_config)
    where = {"device": model.device, "dtype": model.dtype}
    width = text.hidden_size
    shapes = [(heads * size, width), (pairs * size, width), (pairs * size, width), (width, heads * size)]
    shapes += [(text.intermediate_size, width), (text.intermediate_size, width), (width, text.intermediate_size)]
    with torch.inference_mode():
        decoder = _layer(shapes, (heads, pairs, size), ROWS, gated=True, where=where)
        own = [(tower.width, tower.width)] * 4 + [(tower.ffn, tower.width), (tower.width, tower.ffn)]
        split = (vision_heads, vision_heads, tower.width // vision_heads)
        vision = _layer(own, split, VISION_ROWS, gated=False, where=where)
        head, x = torch.randn(text.vocab_size, width, **where), torch.ones(1, width, **where)
        read = head.numel() * head.element_size() / median(timed(partial(linear, x, head), model.device, TURNS))
    last = VISION_ROWS[-1]
    return Calibration(
        decoder, vision, vision_layer_flops(tower.width, tower.ffn, last, last, last), read, _chosen(model, read)
    )


def _layer(
    shapes: Sequence[tuple[int, int]], heads: tuple[int, int, int], rows: Sequence[int], gated: bool, where: dict
) -> Layer:
    """One layer's parts at every number of rows; ``shapes``: (out, in) of its products, the FFN's up and down last."""
    weights = [torch.randn(shape, **where).mul_(0.01) for shape in shapes]
    (many, few, size), width, wide = heads, shapes[0][1], shapes[-1][1]
    times: dict[str, list[float]] = {"products": [], "attention": [], "rest": []}
    for count in rows:
        inputs = {one: torch.randn(count, one, **where) for one in {shape[1] for shape in shapes}}
        query = torch.randn(1, many, count, size, **where)
        key, value = (torch.randn(1, few, count, size, **where) for _ in range(2))
        x, hidden, scale = inputs[width], inputs[wide], torch.ones(width, **where)

        def products(inputs: dict = inputs) -> None:
            for weight in weights:
                linear(inputs[weight.shape[1]], weight)

        def attention(query: Any = query, key: Any = key, value: Any = value) -> None:
            scaled_dot_product_attention(query, key, value, is_causal=gated, enable_gqa=many != few)

        def rest(x: Any = x, hidden: Any = hidden, scale: Any = scale, query: Any = query) -> None:
            for _ in range(2):
                _ = x + rms_norm(x, (width,), scale)
            if gated:
                _ = silu(hidden) * hidden
                for _ in range(2):  # rotary embedding of queries and keys
                    _ = query * query + torch.cat([-query, query], -1)[..., :size] * query
            else:
                silu(hidden)

        for name, work in (("products", products), ("attention", attention), ("rest", rest)):
            times[name].append(median(timed(work, where["device"], TURNS)))
    return Layer(tuple(rows), *(tuple(values) for values in times.values()))


def _chosen(model: Any, read: float) -> float:
    """Bytes per second over chosen neurons, as they are computed here; the plain read rate where nothing is sliced."""
    decoder: Any = family_of(model.config).decoder(model)
    mlp = decoder.layers[0].mlp
    if model.device.type != "cpu" or not sliceable(mlp):
        return read
    count = max(1, round(len(mlp.gate_proj.weight) * KEEP))
    restore = neuron_major(mlp)
    try:
        found = measured(mlp, count)
    finally:
        restore()
    plan = decide(found)
    seconds = found.gathered if plan.gather_after is not None else getattr(found, plan.before)
    rows = len(mlp.gate_proj.weight) if plan.before == "masked" and plan.gather_after is None else count
    return 3 * rows * mlp.gate_proj.weight.shape[1] * mlp.gate_proj.weight.element_size() / seconds


def _heads(text: Any) -> tuple[int, int, int]:
    """Query heads, key-value heads, their width."""
    size = head_width(text)
    return text.num_attention_heads, text.num_key_value_heads, size


def _vision_heads(vision: Any) -> int:
    return getattr(vision, "num_attention_heads", None) or vision.num_heads
