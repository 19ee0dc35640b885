"""What outlives a prefill: per-layer facts that decode needs, and the record the trace is built from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from corematching.engine.ffn import MaskedFFN, SlicedFFN
from corematching.engine.layout import Layout
from corematching.engine.trace import GuideTrace, SampleTrace
from corematching.engine.views import Ledger


@dataclass
class PromptState:
    """One prefill and the decoding that follows it; lives as long as its KV cache."""

    prompt: Layout
    """The sequence before any reduction."""
    images: list[int]
    ledger: Ledger = field(init=False)
    layouts: list[Layout] = field(default_factory=list)
    """Per layer: the sequence that entered it."""
    kv_valid: list[Tensor | None] = field(default_factory=list)
    """Per layer: bool [B, kv] of the prompt's KV rows; None when all are valid."""
    kv_lengths: list[list[int]] = field(default_factory=list)
    """Per layer and sample: KV rows after prefill."""
    shifts: list[Tensor | None] = field(default_factory=list)
    """Per layer: long [B, 1], how far decode positions lie below the original ones; None = 0."""
    neurons: dict[int, Tensor] = field(default_factory=dict)
    """Per layer: chosen FFN neurons [B, k]."""
    ffn: dict[int, SlicedFFN | MaskedFFN] = field(default_factory=dict)
    seen: int = 0
    """Logical tokens so far: the padded prompt and every decoded token."""
    decode_steps: int = 0
    head_positions: list[int] = field(init=False)
    """Per sample: positions for which logits were computed."""
    predictor_weights: float = 0.0
    zeroed_kv: list[int] = field(init=False)
    vision_tokens: list[int] = field(default_factory=list)
    """Per tower layer: tokens of one image that enter its attention."""
    vision_mlp_tokens: list[int] = field(default_factory=list)
    """Per tower layer: tokens of one image that enter its MLP."""
    projected_tokens: list[int] = field(default_factory=list)
    """Per sample."""
    kv_row_bytes: int = 0
    """Bytes of one token's keys and values in one layer."""
    guide: Callable[[], list[GuideTrace | None]] | None = None
    """Reads what a guide model did, one entry per prompt."""

    def __post_init__(self) -> None:
        samples = len(self.prompt.lengths)
        self.ledger = Ledger(samples)
        self.head_positions, self.zeroed_kv = [0] * samples, [0] * samples

    def count_head(self, positions: int) -> None:
        """Note that logits were computed for the last ``positions`` of the batch; padding among them is nobody's."""
        lengths = (self.layouts[-1] if self.layouts else self.prompt).lengths
        self.head_positions = [
            before + min(positions, length) for before, length in zip(self.head_positions, lengths, strict=True)
        ]

    def enter(self, layout: Layout) -> None:
        """Note the sequence that enters the next layer; its KV rows follow from it."""
        self.layouts.append(layout)
        self.kv_valid.append(layout.valid if layout.padded else None)
        self.kv_lengths.append(list(layout.lengths))
        self.shifts.append(None if layout is self.prompt else self._shift(layout))

    def _shift(self, layout: Layout) -> Tensor | None:
        if len(self.layouts) > 1 and self.layouts[-2] is layout:
            return self.shifts[-1]
        return self.prompt.positions[:, -1:] - layout.positions[:, -1:]

    def samples(self) -> list[SampleTrace]:
        """One trace entry per batch row."""
        rows = len(self.prompt.lengths)
        ids = [layout.visual_id.cpu() for layout in _unique(self.layouts)]
        index = {id(layout): ids[i] for i, layout in enumerate(_unique(self.layouts))}
        neurons = {layer: chosen.cpu() for layer, chosen in self.neurons.items()}
        modes = {ffn.mode for ffn in self.ffn.values()}
        guides = self.guide() if self.guide else []
        return [
            self._sample(row, index, neurons, modes, guides[row * len(guides) // rows] if guides else None)
            for row in range(rows)
        ]

    def _sample(self, row: int, ids: dict, neurons: dict, modes: set[str], guide: GuideTrace | None) -> SampleTrace:
        entering: dict[int, Tensor] = {}
        for layout in _unique(self.layouts):
            own = ids[id(layout)][row]
            entering[id(layout)] = own[own > -2].sort().values.to(torch.int32)
        return SampleTrace(
            prompt_tokens=self.prompt.lengths[row],
            image_tokens=self.prompt.visual_counts[row],
            images=self.images[row],
            visual_tokens=[entering[id(layout)] for layout in self.layouts],
            llm_tokens=[layout.lengths[row] for layout in self.layouts],
            kv_lengths=[lengths[row] for lengths in self.kv_lengths],
            kv_bytes=sum(lengths[row] for lengths in self.kv_lengths) * self.kv_row_bytes,
            dense_kv_bytes=self.prompt.lengths[row] * len(self.layouts) * self.kv_row_bytes,
            neurons=[neurons[layer][row].unique() if layer in neurons else None for layer in range(len(self.layouts))],
            ffn_mode="dense" if not modes else "masked" if "masked" in modes else "sliced",
            masked_steps=max((ffn.masked_steps for ffn in self.ffn.values()), default=0),
            vision_tokens=[tokens * self.images[row] for tokens in self.vision_tokens],
            vision_mlp_tokens=[tokens * self.images[row] for tokens in self.vision_mlp_tokens],
            projected_tokens=self.projected_tokens[row],
            head_positions=self.head_positions[row],
            decode_steps=self.decode_steps,
            overhead_flops=self.ledger.flops[row],
            predictor_weights=self.predictor_weights,
            zeroed_kv=self.zeroed_kv[row],
            guide=guide,
        )


def _unique(layouts: list[Layout]) -> list[Any]:
    return list({id(layout): layout for layout in layouts}.values())
