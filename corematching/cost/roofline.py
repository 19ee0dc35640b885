"""The roofline model: how long a trace would take on hardware that is not at hand. Always labelled *predicted*.

Every part takes the longer of its arithmetic at peak rate and its memory traffic at peak bandwidth; weights that do not
fit into device memory come over the host link instead, overlapped with the rest. Real programs are slower: the ratio
prediction / measurement on the machine at hand says by how much.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from corematching.cost.flops import decode_flops, flops
from corematching.cost.towers import tower_of
from corematching.engine.offload import STAGES, resident_layers
from corematching.engine.trace import SampleTrace
from corematching.errors import UserError
from corematching.models.families import family_of, head_width

ELEMENT = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes per number."""


@dataclass(frozen=True)
class Hardware:
    """Public (or measured) peaks of a device."""

    name: str
    flops: dict[str, float]
    """Dense FLOP/s by dtype."""
    bandwidth: float
    """Device memory, bytes per second."""
    memory: float
    """Device memory, bytes."""
    link: float
    """Host to device, bytes per second in one direction."""
    dtype: str = "float16"
    """What models are loaded and computed in on this device."""

    def rate(self, dtype: str) -> float:
        """FLOP/s at a dtype.

        Raises
        ------
        UserError
            If the profile has no figure for it.
        """
        if dtype not in self.flops:
            raise UserError(f"dtype={dtype!r} has no peak on {self.name}: choose from {', '.join(sorted(self.flops))}")
        return self.flops[dtype]


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model's parts, in numbers of weights."""

    vision: float
    projector: float
    attention: float
    """One decoder layer's four projections."""
    neuron: float
    """One FFN neuron: a gate row, an up row, a down column."""
    ffn_width: int
    depth: int
    head: float
    embedding: float

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """From the transformers config; norms and biases, a few parts in ten thousand, are left out."""
        family_of(config)
        text, tower = config.text_config, tower_of(config.to_dict())
        d = text.hidden_size
        head_dim = head_width(text)
        return cls(
            vision=tower.weights,
            projector=tower.projector_weights,
            attention=2 * d * head_dim * (text.num_attention_heads + text.num_key_value_heads),
            neuron=3 * d,
            ffn_width=text.intermediate_size,
            depth=text.num_hidden_layers,
            head=text.vocab_size * d,
            embedding=0 if getattr(config, "tie_word_embeddings", False) else text.vocab_size * d,
        )

    @property
    def layer(self) -> float:
        return self.attention + self.neuron * self.ffn_width

    @property
    def total(self) -> float:
        return self.vision + self.projector + self.depth * self.layer + self.head + self.embedding


def decode_bytes(config: Any, sample: SampleTrace | Sequence[SampleTrace], element: int, steps: int) -> float:
    """Bytes one decode step must read, on average over ``steps``: weights, KV rows, lm_head.

    Parameters
    ----------
    sample
        A prompt's trace, or those of a batch: its prompts share a read of the weights. Where they chose different
        neurons FFNs count whole, which is more than the union of the neurons that is read where that is faster.
    element
        Bytes per weight.
    """
    samples = [sample] if isinstance(sample, SampleTrace) else list(sample)
    weights = max(_weights_read(config, one, steps) for one in samples)
    return weights * element + sum(kv_bytes_read(one, steps) for one in samples)


def _weights_read(config: Any, sample: SampleTrace, steps: int) -> float:
    """Weights that a decode step of one prompt reads."""
    sizes = Sizes.of(config)
    weights = sizes.head + config.text_config.hidden_size + sample.predictor_weights
    for neurons in sample.neurons:
        weights += sizes.attention + sizes.neuron * sample.ffn_width(neurons, sizes.ffn_width, steps)
    return weights


def kv_bytes_read(sample: SampleTrace, steps: int) -> float:
    """Bytes of KV rows that a decode step of one prompt reads, and what choosing them reads."""
    row = sample.dense_kv_bytes / ((sample.past_tokens + sample.prompt_tokens) * len(sample.llm_tokens))
    rows = 0.0
    for layer, kv in enumerate(sample.kv_lengths):
        read = sample.rows_per_step(layer, steps)
        rows += kv + (steps + 1) / 2 if read is None else read
    return row * rows + sample.choosing(steps)[1]


def in_dtype(config: Any, sample: SampleTrace, dtype: str) -> SampleTrace:
    """The trace as a run in another type would have left it: bytes of the KV cache follow the type."""
    text = config.text_config
    head_dim = head_width(text)
    dense = sample.prompt_tokens * len(sample.llm_tokens) * 2 * text.num_key_value_heads * head_dim * ELEMENT[dtype]
    return replace(sample, dense_kv_bytes=dense, kv_bytes=round(sample.kv_bytes * dense / sample.dense_kv_bytes))


def at_depth(config: Any, sample: SampleTrace, depth: int) -> tuple[Any, SampleTrace]:
    """The config and trace of a model of ``depth`` layers, extrapolated from a slice of its first ones.

    Every further layer is taken to be as the last one traced. Overhead grows with depth if neurons were chosen, since
    that happens in every layer; dropping tokens happens in the first ones.
    """
    traced = len(sample.llm_tokens)
    if depth <= traced:
        return config, sample
    config = copy.deepcopy(config)
    config.text_config.num_hidden_layers = depth

    def longer(values: Sequence) -> list:
        return [*values, *[values[-1]] * (depth - traced)]

    row = sample.dense_kv_bytes // (sample.prompt_tokens * traced)
    kv_lengths = longer(sample.kv_lengths)
    per_layer = bool(sample.rows_read) or any(neurons is not None for neurons in sample.neurons)
    return config, replace(
        sample,
        visual_tokens=longer(sample.visual_tokens),
        llm_tokens=longer(sample.llm_tokens),
        kv_lengths=kv_lengths,
        kv_bytes=sum(kv_lengths) * row,
        dense_kv_bytes=sample.prompt_tokens * depth * row,
        neurons=longer(sample.neurons),
        overhead_flops=sample.overhead_flops * (depth / traced if per_layer else 1),
        predictor_weights=sample.predictor_weights * depth / traced,
        rows_read=longer(sample.rows_read) if sample.rows_read else [],
        choice_flops=[flops * depth / traced for flops in sample.choice_flops],
        choice_bytes=[read * depth / traced for read in sample.choice_bytes],
    )


@dataclass(frozen=True)
class Prediction:
    """Seconds and bytes. ``regime`` is "resident", or "offloaded" where FFN weights are streamed from the host."""

    prefill: float
    decode_per_token: float
    regime: str
    resident_bytes: float
    streamed_per_token: float

    def end_to_end(self, output_tokens: int) -> float:
        return self.prefill + (output_tokens - 1) * self.decode_per_token


def predict(
    config: Any,
    sample: SampleTrace | Sequence[SampleTrace],
    hardware: Hardware,
    dtype: str,
    output_tokens: int = 128,
) -> Prediction:
    """What a prompt's trace, or a batch's, would take on a device, at its peaks.

    Where the weights do not fit, as many whole FFNs as do stay on the device and the others are streamed: in prefill by
    everyone, in decode by all but methods that keep chosen neurons (see :mod:`corematching.engine.offload`).
    """
    samples = [sample] if isinstance(sample, SampleTrace) else list(sample)
    first, element = samples[0], ELEMENT[dtype]
    sizes, rate = Sizes.of(config), hardware.rate(dtype)
    steps = max(output_tokens - 1, 1)
    chosen = [None if first.ffn_mode in ("masked", "whole") else neurons for neurons in first.neurons]
    widths = [sizes.ffn_width if neurons is None else len(neurons) for neurons in chosen]
    sliced = all(neurons is not None for neurons in chosen) and not first.predictor_weights
    ffn = sizes.neuron * sizes.ffn_width * element
    others = (sizes.total - sizes.depth * sizes.neuron * sizes.ffn_width) * element
    others += sum(one.dense_kv_bytes for one in samples)
    share = max(widths) / sizes.ffn_width if sliced else 0.0
    whole = resident_layers(hardware.memory - others, ffn, sizes.depth, share)
    missing = sizes.depth - whole
    cost = flops(config, samples)
    read = decode_bytes(config, samples, element, steps)
    prefill = max(
        (cost.vision + cost.projector) / rate, (sizes.vision + sizes.projector) * element / hardware.bandwidth
    )
    prefill += (cost.overhead - sum(sum(one.choice_flops) for one in samples)) / rate
    prefill += max(
        cost.prefill / rate, sizes.depth * sizes.layer * element / hardware.bandwidth, missing * ffn / hardware.link
    )
    prefill += sizes.head * element / hardware.bandwidth
    arithmetic = sum(
        decode_flops(config, one, steps) / steps + 2 * sizes.head + one.choosing(steps)[0] for one in samples
    )
    streamed = 0.0 if sliced else missing * ffn
    step = max(arithmetic / rate, read / hardware.bandwidth, streamed / hardware.link)
    slices = missing * sum(widths) / len(widths) * sizes.neuron * element if sliced else 0.0
    held = others + whole * ffn + slices + (STAGES * ffn if missing else 0.0)
    return Prediction(prefill, step, "offloaded" if missing else "resident", held, streamed)
