"""Traces from shapes alone: a narrow twin of a model runs the method in its place.

The twin has the model's layers, heads, FFN neurons, patches and vocabulary; only hidden widths are divided. What a
method with a forced budget does to tokens, KV rows and neurons depends on none of them, so the twin's trace is the
model's; of decoder layers that are all alike, the last one run stands for the others. KV bytes follow from the
configuration. The FLOPs of a method's own scoring are polynomials of degree two in the width: extrapolated from three
widths. Weights are random: what a method that adapts would choose is not predicted.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from math import gcd
from typing import Any

import torch

from corematching.cost.roofline import at_depth, in_dtype
from corematching.efficiency.inputs import fixed_inputs
from corematching.engine.compiled import generate
from corematching.engine.trace import SampleTrace
from corematching.errors import UserError
from corematching.methods.base import AfterPrefill, BeforeLayer, ChooseNeurons, Guide, Method, PredictNeurons, Stage
from corematching.models.checkpoint import random_weights
from corematching.models.families import family_of, head_width

WIDTHS = (1, 2, 3)
"""Multiples of the narrowest width; three, since a polynomial of degree two goes through three points."""


def trace_of_shapes(config: Any, method: Method, before: int = 35, after: int = 40) -> SampleTrace:
    """What a method does to a prompt of fixed lengths, and to two tokens of an answer, in float32.

    Parameters
    ----------
    config
        The model's transformers configuration.
    before, after
        Text tokens around the visual ones.

    Raises
    ------
    UserError
        If the model is no LLaVA-1.5, or the method needs what only the model itself has, such as trained predictors.
    """
    unit, depth = _divisor(config), config.text_config.num_hidden_layers
    layers = _layers_enough(config, method)
    sample = _run(_narrow(config, unit, 1, layers), method, before, after)
    overhead = [sample.overhead_flops]
    if overhead[0]:
        wider = (_narrow(config, unit, times, layers) for times in WIDTHS[1:])
        overhead += [_run(twin, method, before, after).overhead_flops for twin in wider]
    _, whole = at_depth(config, sample, depth)
    return in_dtype(config, replace(whole, overhead_flops=_extrapolated(overhead, unit)), "float32")


def _layers_enough(config: Any, method: Method) -> int:
    """Decoder layers after which every further one is as the last: a few, for methods that drop tokens early.

    All of them for methods that cut KV caches, predict neurons or ask a guide, and where stages depend on the depth.
    """
    geometry = family_of(config).geometry(config)
    stages = method.stages(geometry)
    if any(isinstance(stage, AfterPrefill | PredictNeurons | Guide) for stage in stages):
        return geometry.depth
    enough = min(
        geometry.depth, max((stage.layer for stage in stages if isinstance(stage, BeforeLayer)), default=0) + 2
    )
    try:
        shallow = method.stages(replace(geometry, depth=enough))
    except UserError:
        return geometry.depth
    return enough if _places(shallow) == _places(stages) else geometry.depth


def _places(stages: Sequence[Stage]) -> list[tuple[str, int | None]]:
    """Where stages act; the choice of neurons, which is the same in every layer, aside."""
    return [(type(one).__name__, getattr(one, "layer", None)) for one in stages if not isinstance(one, ChooseNeurons)]


def _divisor(config: Any) -> int:
    """By how much widths can be divided: rotary embeddings need heads of an even width, the tower's of at least 1."""
    text, vision = config.text_config, config.vision_config
    if config.model_type != "llava":
        raise UserError(f"model type {config.model_type!r} cannot be predicted from shapes yet: give a LLaVA-1.5")
    head = head_width(text)
    return gcd(head // 2, vision.hidden_size // vision.num_attention_heads)


def _narrow(config: Any, divisor: int, times: int, layers: int) -> Any:
    """The configuration with hidden widths divided, then multiplied, and so many decoder layers."""
    config = copy.deepcopy(config)
    config.text_config.num_hidden_layers = layers
    for part in (config.text_config, config.vision_config):
        part.hidden_size = part.hidden_size // divisor * times
        if getattr(part, "head_dim", None):
            part.head_dim = part.head_dim // divisor * times
    return config


def _run(config: Any, method: Method, before: int, after: int) -> SampleTrace:
    model = random_weights(config, torch.float32, torch.device("cpu"), seed=0).eval()
    with method(model) as trace:
        generate(model, fixed_inputs(model, before, after), 2)
    (sample,) = trace.drain()
    return replace(sample, masked_steps=0)


def _extrapolated(values: list[float], at: int) -> float:
    """The polynomial of degree two through the values at 1, 2 and 3, elsewhere; one value stands for no dependence."""
    if len(values) == 1:
        return values[0]
    one, two, three = values
    return one + (at - 1) * (two - one) + (at - 1) * (at - 2) / 2 * (three - 2 * two + one)
