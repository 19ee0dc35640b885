"""Measuring the memory-limited regime: dense streams FFN weights for every token, chosen neurons stay resident."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from corematching import build_method
from corematching.cost.roofline import Sizes
from corematching.efficiency.latency import CAPTURE_WARM_UPS, Pair, Run, Spread, answer
from corematching.efficiency.peaks import Peaks
from corematching.efficiency.rows import Measured, Protocol, row_of
from corematching.engine.offload import memory_budget, offload, resident_layers
from corematching.methods.base import ChooseNeurons, Method
from corematching.models.families import family_of, head_width

WORKSPACE = 1.0e9
"""Bytes set aside on a GPU for activations (resident FFNs' wait for the choice of neurons), the allocator's slack and
library workspaces."""


def plan(model: Any, method: Method, budget: float, prompt_tokens: int, room: int) -> int:
    """How many FFNs stay whole on the device under a budget.

    Parameters
    ----------
    budget
        Bytes of device memory for everything.
    prompt_tokens, room
        Length of the prompt and of the answer: their KV cache is kept twice while a static decoder takes it over.

    Raises
    ------
    UserError
        If the budget is too small for any split.
    """
    geometry = family_of(model.config).geometry(model.config)
    room_for_ffns = budget - other_bytes(model, prompt_tokens, room)
    return resident_layers(room_for_ffns, ffn_bytes(model), geometry.depth, _share(method, geometry))


def ffn_bytes(model: Any) -> float:
    """Weights of one decoder layer's FFN."""
    sizes = Sizes.of(model.config)
    return sizes.neuron * sizes.ffn_width * model.dtype.itemsize


def other_bytes(model: Any, prompt_tokens: int, room: int) -> float:
    """Everything but the FFNs: the other weights, the KV cache of an answer, and on a GPU a workspace."""
    sizes, text = Sizes.of(model.config), model.config.text_config
    head_dim = head_width(text)
    kv = 2 * sizes.depth * text.num_key_value_heads * head_dim * (2 * prompt_tokens + room)
    weights = sizes.total - sizes.depth * sizes.neuron * sizes.ffn_width
    return (weights + kv) * model.dtype.itemsize + (WORKSPACE if model.device.type == "cuda" else 0.0)


def _share(method: Method, geometry: Any) -> float:
    """Kept share of the FFNs if the method chooses neurons in every layer once per prompt, else 0."""
    stages = [stage for stage in method.stages(geometry) if isinstance(stage, ChooseNeurons)]
    if len({stage.layer for stage in stages}) < geometry.depth:
        return 0.0
    parameters = method.parameters
    parts = [parameters, parameters.get("first", {}), parameters.get("second", {})]
    shares = [part.get("beta", part.get("keep")) for part in parts]
    return max((share for share in shares if isinstance(share, float)), default=1.0)


def measure_offloaded(
    model: Any, method: Method, inputs: dict[str, Tensor], protocol: Protocol, peaks: Peaks, budget: float
) -> Measured:
    """Time a method and dense under a device memory budget, in turns.

    Each gets the split that suits it best. Whoever streams in decode does so eagerly, since a captured step cannot
    fetch weights; a method that keeps its neurons uses the protocol's engine. Rows say which engine each side used.

    Parameters
    ----------
    budget
        Bytes of device memory.
    """
    dense = build_method("dense")
    lengths = sorted(protocol.output_tokens)
    prompt = inputs["input_ids"].shape[1]
    pair, streamed = Pair(), 0
    for repeat in range(protocol.repeats):
        order = [(dense, pair.dense), (method, pair.method)]
        for subject, runs in order if repeat % 2 == 0 else order[::-1]:
            resident = plan(model, subject, budget, prompt, lengths[-1])
            keeps = _share(subject, family_of(model.config).geometry(model.config)) > 0
            engine = protocol.engine if keeps or resident == model.config.text_config.num_hidden_layers else "eager"
            run, moved = _offloaded_answer(model, subject, inputs, lengths, engine, resident, budget)
            runs.append(run)
            if subject is method:
                streamed = moved
    measured = Measured(pair, Spread(0.0, 0.0), streamed_bytes=streamed)
    depth = family_of(model.config).geometry(model.config).depth
    fits = plan(model, dense, budget, prompt, lengths[-1]) == depth
    regime = f"{'resident within' if fits else 'offloaded,'} {budget / 1e9:.3g} GB"
    for tokens in lengths:
        row = row_of(model.config, measured, tokens, peaks, model.dtype, regime)
        # The reads of a streaming step come over the link: bandwidth figures of device memory would mislead.
        hidden = ("decode_gb_per_s", "bandwidth_share", "flops_share", "byte_limit_decode_speedup", "overhead_ms")
        row |= dict.fromkeys((name for name in hidden if name in row), None)
        row["memory_budget_bytes"] = budget
        if tokens == lengths[-1]:
            row["streamed_bytes"] = streamed
        measured.rows[tokens] = row
    return measured


def _offloaded_answer(
    model: Any, method: Method, inputs: dict[str, Tensor], lengths: list[int], engine: str, resident: int, budget: float
) -> tuple[Run, int]:
    """One timed answer, after a warm-up, and the bytes it streamed."""
    with offload(model, resident) as traffic, memory_budget(model.device, budget):
        with method(model) as trace, torch.inference_mode():
            if engine == "compiled":  # what is captured depends on the answer's length
                for _ in range(CAPTURE_WARM_UPS):
                    answer(model, trace, inputs, lengths, engine)
            else:
                answer(model, trace, inputs, [1, 2], engine)
            before = replace(traffic)
            run = answer(model, trace, inputs, lengths, engine)
        return run, traffic.bytes - before.bytes
