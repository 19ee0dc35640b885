"""One prompt under one method: what its decode steps say, read, cover and take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from corematching.efficiency.latency import answer
from corematching.engine.trace import SampleTrace
from corematching.methods.base import AfterPrefill, ChooseRows, Method
from corematching.methods.measured import Measured
from corematching.models.families import family_of

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Forced:
    """Decode steps that are fed the dense answer: the likeliest token after each, and what ran."""

    said: Tensor
    """Long [T - 1]."""
    targets: Tensor
    """Long [T - 1]: what dense says there."""
    trace: SampleTrace


@torch.inference_mode()
def dense_answer(model: Any, inputs: Inputs, tokens: int) -> Tensor:
    """Long [T]: the dense model's greedy answer of exactly so many tokens, wherever it would have ended."""
    found = model.generate(
        **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    return found[0, inputs["input_ids"].shape[1] :]


@torch.inference_mode()
def forced(model: Any, method: Method, inputs: Inputs, spoken: Tensor) -> Forced:
    """Feed the dense answer step by step under a method, with what its steps cover measured."""
    with Measured(method)(model) as trace:
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        mask, said = inputs["attention_mask"], []
        for token in spoken[:-1]:
            mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
            out = model(input_ids=token.view(1, 1), attention_mask=mask, past_key_values=cache, logits_to_keep=1)
            said.append(out.logits[0, -1].argmax())
        (sample,) = trace.drain()
    return Forced(torch.stack(said).cpu(), spoken[1:].cpu(), sample)


@torch.inference_mode()
def seconds_per_token(model: Any, method: Method, inputs: Inputs, tokens: int) -> float:
    """Mean seconds of a decode step, under the method as it is; a warm-up of few words is discarded."""
    image_token = family_of(model.config).image_token_id(model.config)
    words = inputs["input_ids"][inputs["input_ids"] != image_token][None, :8]
    with method(model) as trace:
        answer(model, trace, {"input_ids": words, "attention_mask": torch.ones_like(words)}, [1, 4], "eager")
        run = answer(model, trace, inputs, [1, tokens], "eager")
    seconds = run.decode_per_token(tokens)
    assert seconds is not None
    return seconds


def chooses(method: Method, config: Any) -> bool:
    """Whether a method has decode steps read fewer rows of a model with this configuration."""
    stages = method.stages(family_of(config).geometry(config))
    return any(isinstance(stage, AfterPrefill | ChooseRows) for stage in stages)


def rows_of_steps(trace: SampleTrace) -> dict[str, float]:
    """KV rows read and held per step and layer, and the share of dense attention on those read: means."""
    steps = trace.decode_steps
    held, read, mass = [], [], []
    for layer in range(len(trace.kv_lengths)):
        own = [float(trace.rows_held(layer, step)) for step in range(steps)]
        held += own
        read += _own(trace.rows_read, layer) or own
        mass += _own(trace.mass_read, layer) or [1.0] * steps
    return {"rows_held": fmean(held), "rows_read": fmean(read), "mass_read": fmean(mass)}


def _own(by_layer: Sequence[Sequence[float]], layer: int) -> list[float]:
    return list(by_layer[layer]) if by_layer else []
