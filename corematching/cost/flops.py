"""FLOPs from the trace: exact, and in the two conventions papers use.

Exact counts are 2 per multiply-add over every matrix product and convolution, attention included at its full
(unmasked) size, as ``torch.utils.flop_counter.FlopCounterMode`` counts; norms, rotary embeddings and activations are
left out, as everyone does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from corematching.cost.shapes import decoder_layer_flops, vision_layer_flops
from corematching.cost.towers import tower_of
from corematching.engine.trace import SampleTrace, Trace
from corematching.errors import UserError
from corematching.models.families import family_of, head_width


@dataclass(frozen=True)
class Flops:
    """A FLOPs breakdown, 2 per multiply-add."""

    vision: float = 0.0
    """Vision tower, patch embedding included."""
    projector: float = 0.0
    prefill: float = 0.0
    """Decoder layers over the prompt."""
    decode: float = 0.0
    """Decoder layers over the generated tokens."""
    lm_head: float = 0.0
    overhead: float = 0.0
    """The method's own scoring, and its guide model if it has one."""

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def __add__(self, other: Flops) -> Flops:
        return Flops(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __truediv__(self, count: float) -> Flops:
        return Flops(**{f.name: getattr(self, f.name) / count for f in fields(self)})

    def as_dict(self) -> dict[str, float]:
        """The parts and their ``total``."""
        return {**asdict(self), "total": self.total}


def flops(config: Any, trace: Trace | SampleTrace | Iterable[SampleTrace]) -> Flops:
    """FLOPs of everything a trace saw, summed over its samples (divide by their number for a mean).

    Parameters
    ----------
    config
        The model's transformers config.
    trace
        A trace, or one or several of its samples.

    Returns
    -------
    Flops, exact, 2 per multiply-add.

    Raises
    ------
    UserError
        If `config` is of no supported model, or `trace` is none.
    """
    family_of(config)
    if isinstance(trace, SampleTrace):
        return _sample_flops(config, trace)
    samples = trace.samples if isinstance(trace, Trace) else list(trace) if isinstance(trace, Iterable) else [trace]
    for sample in samples:
        if not isinstance(sample, SampleTrace):
            raise UserError(f"{type(sample).__name__} is no trace: give what `with method(model) as trace` yields")
    return sum((_sample_flops(config, sample) for sample in samples), Flops())


def _sample_flops(config: Any, sample: SampleTrace) -> Flops:
    text = config.text_config
    past = sample.past_kv or [0] * len(sample.llm_tokens)
    prefill = sum(
        _layer_flops(text, tokens, tokens + before, text.intermediate_size)
        for tokens, before in zip(sample.llm_tokens, past, strict=True)
    )
    ran = sample.prefills > 0  # a copied KV cache goes on without its prompt
    return Flops(
        vision=vision_flops(config, sample) if ran else 0.0,
        projector=_projector_flops(config, sample) if ran else 0.0,
        prefill=prefill * sample.prefills,
        decode=decode_flops(config, sample, sample.decode_steps, sample.decode_reach),
        lm_head=2.0 * text.hidden_size * text.vocab_size * sample.head_positions,
        overhead=sample.overhead_flops + _guide_flops(sample),
    )


def _guide_flops(sample: SampleTrace) -> float:
    if sample.guide is None:
        return 0.0
    passes = sum(_sample_flops(sample.guide.config, run).total for run in sample.guide.passes)
    return passes + sample.guide.scoring_flops


def decode_flops(config: Any, sample: SampleTrace, steps: int, reach: int | None = None) -> float:
    """FLOPs of the decoder layers for ``steps`` tokens after this sample's prefill (without lm_head).

    Parameters
    ----------
    reach
        Sum over these tokens of the rows behind the prefill's that each attends to; None: one token after the other.
    """
    if reach is None:
        reach = steps * (steps + 1) // 2
    text = config.text_config
    total = 0.0
    for layer, (kv, neurons) in enumerate(zip(sample.kv_lengths, sample.neurons, strict=True)):
        width = sample.ffn_width(neurons, text.intermediate_size, steps)
        # The attention term is linear in the number of rows, so their average is enough.
        average_kv = sample.rows_per_step(layer, steps)
        if average_kv is None:
            average_kv = kv + reach / steps if steps else kv
        total += steps * _layer_flops(text, 1, average_kv, width)
    return total


def layer_flops(config: Any, queries: float, keys: float) -> float:
    """FLOPs of a decoder layer, whose FFN runs whole, over ``queries`` tokens that attend to ``keys`` rows."""
    return _layer_flops(config.text_config, queries, keys, config.text_config.intermediate_size)


def _layer_flops(text: Any, queries: float, keys: float, ffn_width: float) -> float:
    """One decoder layer: ``queries`` tokens attending to ``keys`` rows, ``ffn_width`` neurons in a gated FFN."""
    head_dim = head_width(text)
    q_width, kv_width = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    return decoder_layer_flops(text.hidden_size, q_width, kv_width, queries, keys, ffn_width)


def vision_flops(config: Any, sample: SampleTrace) -> float:
    """FLOPs of the vision tower, patch embedding included."""
    if not _all_alike(config):
        return tower_of(config.to_dict()).flops(sample.patches)
    vision = config.vision_config
    rows, columns = family_of(config).grid(config)
    width = vision.hidden_size
    embedding = 2.0 * sample.images * rows * columns * width * vision.num_channels * vision.patch_size**2
    layers = 0.0
    counts = zip(sample.vision_tokens, sample.vision_mlp_tokens, sample.vision_pairs, strict=True)
    for entering, staying, pairs in counts:
        per_image = pairs / entering if entering else 0.0
        layers += vision_layer_flops(width, vision.intermediate_size, entering, staying, per_image)
    return embedding + layers


def _projector_flops(config: Any, sample: SampleTrace) -> float:
    tower = tower_of(config.to_dict())
    if not _all_alike(config):
        return tower.projector_flops(sample.patches)
    return 2.0 * sample.projected_tokens * tower.projector_weights


def _all_alike(config: Any) -> bool:
    """Whether images are all of one size, so that a method may thin out the tower's tokens; else it runs whole."""
    return family_of(config).image_tokens(config) is not None


# ------------------------------------------------------------------------------------------------ papers' conventions
def fastv_eq5(config: Any, sample: SampleTrace) -> float:
    """FastV's equation 5: 4nd^2 + 2n^2d + 2ndm per layer over the tokens entering it; 1 per multiply-add, LLM only."""
    return _convention(config, sample, ffn_products=2)


def llama_3ndm(config: Any, sample: SampleTrace) -> float:
    """The same with a gated FFN's three products: 4nd^2 + 2n^2d + 3ndm; 1 per multiply-add, LLM only."""
    return _convention(config, sample, ffn_products=3)


def _convention(config: Any, sample: SampleTrace, ffn_products: int) -> float:
    d, m = config.text_config.hidden_size, config.text_config.intermediate_size
    return float(sum(4 * n * d * d + 2 * n * n * d + ffn_products * n * d * m for n in sample.llm_tokens))


CONVENTIONS = {"fastv_eq5": fastv_eq5, "llama_3ndm": llama_3ndm}
