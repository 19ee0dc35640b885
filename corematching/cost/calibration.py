"""A second prediction for the machine at hand: as the roofline model's, but at rates that its own kernels reach.

A peak is reached by large products only. What small matrices, attention, norms and the engine's steps take is measured
once per machine, type and shape (:mod:`corematching.efficiency.kernels`), by number of rows; a trace says how many rows
went through every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from corematching.cost.flops import flops
from corematching.cost.roofline import Prediction, Sizes, kv_bytes_read
from corematching.engine.trace import SampleTrace


@dataclass(frozen=True)
class Layer:
    """What one transformer layer's parts take, by number of rows (ascending). Seconds."""

    rows: tuple[int, ...]
    products: tuple[float, ...]
    """Its projections and its FFN's products."""
    attention: tuple[float, ...]
    """As many queries over as many keys, one image or prompt."""
    rest: tuple[float, ...]
    """Norms, activation, residual sums."""

    def seconds(self, part: str, rows: float) -> float:
        """A part's time at any number of rows: linear between measured ones, beyond the last in proportion.

        Attention grows with the square of the rows beyond the last.
        """
        times = getattr(self, part)
        if rows >= self.rows[-1]:
            return times[-1] * (rows / self.rows[-1]) ** (2 if part == "attention" else 1)
        for place, (low, high) in enumerate(zip(self.rows, self.rows[1:], strict=False)):
            if rows <= high:
                share = max(0.0, (rows - low) / (high - low))
                return times[place] + share * (times[place + 1] - times[place])
        return times[-1]

    def whole(self, rows: float) -> float:
        """All parts together."""
        return sum(self.seconds(part, rows) for part in ("products", "attention", "rest"))


@dataclass(frozen=True)
class Calibration:
    """What kernels of a model's shapes take on the machine at hand."""

    text: Layer
    """A decoder layer; one row is a decode step."""
    vision: Layer
    """A layer of the vision tower."""
    vision_layer_flops: float
    """Of a tower's layer at the largest number of rows."""
    read: float
    """Bytes per second at which a decode step reads lm_head and the KV cache."""
    chosen: float
    """Bytes per second at which a decode step reads chosen neurons."""


def calibrated(
    config: Any,
    samples: Sequence[SampleTrace],
    known: Calibration,
    element: int,
    output_tokens: int,
    decisions: tuple[float, float] = (0.0, 0.0),
) -> Prediction:
    """What a prompt (or a batch) takes with everything resident, at measured rates.

    Parameters
    ----------
    samples
        Traces of the batch, one per prompt.
    element
        Bytes per weight.
    decisions
        Seconds that the method's decisions take in prefill, and in decode for the whole answer.
    """
    sizes, steps = Sizes.of(config), max(output_tokens - 1, 1)
    cost = flops(config, samples)
    tower = known.vision.whole(known.vision.rows[-1]) / known.vision_layer_flops
    prefill = (cost.vision + cost.projector) * tower + sizes.head * element / known.read + decisions[0]
    for layer in range(sizes.depth):
        entering = [sample.llm_tokens[layer] for sample in samples]
        prefill += sum(known.text.seconds(part, sum(entering)) for part in ("products", "rest"))
        prefill += sum(known.text.seconds("attention", tokens) for tokens in entering)
    step = decisions[1] / steps
    for layer in range(sizes.depth):
        step += _layer_step(sizes, samples, known, element, steps, layer)
    step += (sizes.head * element + sum(kv_bytes_read(sample, steps) for sample in samples)) / known.read
    held = sizes.total * element + sum(sample.dense_kv_bytes for sample in samples)
    return Prediction(prefill, step, "resident", held, 0.0)


def _layer_step(
    sizes: Sizes, samples: Sequence[SampleTrace], known: Calibration, element: int, steps: int, layer: int
) -> float:
    """A layer's share of a decode step: whole at the rate of its products, or over chosen neurons."""
    rows = len(samples)
    width = max(sample.ffn_width(sample.neurons[layer], sizes.ffn_width, steps) for sample in samples)
    products = known.text.seconds("products", rows)
    if width < sizes.ffn_width:
        products *= sizes.attention / sizes.layer
        products += width * sizes.neuron * element / known.chosen
    return products + known.text.seconds("rest", rows)
