"""What outlives a prefill: per-layer facts that decode needs, and the record the trace is built from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from corematching.engine.ffn import MaskedFFN, SlicedFFN
from corematching.engine.indices import PackedIndices
from corematching.engine.layout import NO_PAST, Layout, Past, joined
from corematching.engine.row_choices import RowChoices
from corematching.engine.trace import GuideTrace, SampleTrace
from corematching.engine.views import Ledger
from corematching.engine.visual import PromptImages

FFN_MODES = ("whole", "masked", "sliced")
"""How a decode step computes FFNs with chosen neurons; the first that some layer used describes a prompt."""


@dataclass
class PromptState:
    """One turn: a prefill and the decoding that follows it; lives as long as its KV cache."""

    prompt: Layout
    """The turn's sequence before any reduction."""
    images: PromptImages
    past: list[Past] = field(default_factory=list)
    """Per layer."""
    past_tokens: list[int] = field(default_factory=list)
    """Per sample: tokens of earlier turns, before any reduction."""
    ledger: Ledger = field(init=False)
    layouts: list[Layout] = field(default_factory=list)
    """Per layer: the sequence that entered it."""
    kv_valid: list[Tensor | None] = field(default_factory=list)
    """Per layer: bool [B, kv] of the KV rows after prefill, earlier turns' first; None when all are valid."""
    kv_rows: list[int] = field(default_factory=list)
    """Per layer: KV rows after prefill, padding included."""
    kv_lengths: list[list[int]] = field(default_factory=list)
    """Per layer and sample: valid KV rows after prefill."""
    shifts: list[Tensor | None] = field(default_factory=list)
    """Per layer: long [B, 1] (or [R, B, 1]), how far decode positions lie below the original ones; None = 0."""
    neurons: dict[int, Tensor] = field(default_factory=dict)
    """Per layer: chosen FFN neurons [B, k]."""
    ffn: dict[int, SlicedFFN | MaskedFFN] = field(default_factory=dict)
    order: Tensor | None = None
    """Long: which of the prefill's rows the batch is made of now; None = all, in order."""
    decode_steps: int = 0
    decode_reach: int = 0
    """Sum over the decoded tokens of the rows behind the prefill's that each attended to."""
    discarded_tokens: int = 0
    prefills: int = 1
    head_positions: list[int] = field(init=False)
    """Per sample: positions for which logits were computed."""
    predictor_weights: float = 0.0
    zeroed_kv: list[int] = field(init=False)
    vision_tokens: list[list[list[int]]] = field(default_factory=list)
    """Per tower layer and sample: lengths of the sequences that its attention runs over (images, crops or windows)."""
    vision_mlp_tokens: list[list[int]] = field(default_factory=list)
    """Per tower layer and sample: tokens of all images that enter its MLP."""
    projected_tokens: list[int] = field(default_factory=list)
    """Per sample."""
    kv_row_bytes: int = 0
    """Bytes of one token's keys and values in one layer."""
    rows: RowChoices | None = None
    """What decode steps read, where a method chooses it."""
    guide: Callable[[], list[GuideTrace | None]] | None = None
    """Reads what a guide model did, one entry per prompt."""
    _entering: Tensor | None = field(default=None, repr=False)

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
        layer = len(self.layouts)
        past = self.past[layer] if self.past else NO_PAST
        again = layer > 0 and self.layouts[-1] is layout and (not self.past or self.past[layer - 1] is past)
        if not again:  # one tensor for all layers alike: they share masks, too
            self._entering = joined(past, layout.valid if layout.padded else None, layout.valid.shape[1])
        self.layouts.append(layout)
        self.kv_rows.append(past.rows + layout.valid.shape[1])
        self.kv_valid.append(self._entering)
        before = past.lengths or [0] * len(layout.lengths)
        self.kv_lengths.append([old + new for old, new in zip(before, layout.lengths, strict=True)])
        self.shifts.append(self.shifts[-1] if again else self._shift(layout, past))

    def _shift(self, layout: Layout, past: Past) -> Tensor | None:
        if layout is self.prompt:
            return past.shift
        own = self.prompt.positions[..., -1:] - layout.positions[..., -1:]
        return own if past.shift is None else own + past.shift

    # -------------------------------------------------------------------------------------------------------- decoding
    def decode(self, tokens: int, before: int) -> None:
        """Count ``tokens`` decoded at once behind ``before`` others."""
        self.decode_steps += tokens
        self.decode_reach += tokens * (before + tokens)

    @property
    def counters(self) -> tuple[int, int, int, list[int], list[float], RowChoices | None]:
        """What decoding counts up and notes."""
        spent, rows = list(self.ledger.flops), self.rows and self.rows.snapshot()
        return self.decode_steps, self.decode_reach, self.discarded_tokens, self.head_positions, spent, rows

    @counters.setter
    def counters(self, values: tuple[int, int, int, list[int], list[float], RowChoices | None]) -> None:
        self.decode_steps, self.decode_reach, self.discarded_tokens, self.head_positions, spent, self.rows = values
        self.ledger.flops = list(spent)

    def absorb(self, again: PromptState) -> None:
        """Book a further run of the same prompt, as every step without a KV cache is one."""
        self.discarded_tokens = self.decode_steps
        self.prefills += 1
        self.decode_steps += again.decode_steps
        self.decode_reach += again.decode_reach
        self.ledger.spend(again.ledger.flops)
        self.neurons, self.ffn = again.neurons, again.ffn
        self.kv_lengths = again.kv_lengths

    def take(self, rows: Tensor) -> None:
        """The batch is now made of these rows of what it was (beams were reordered, samples left or repeated)."""
        moved: dict[int, Tensor] = {}

        def of(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            return moved.setdefault(id(values), values.index_select(-2, rows.to(values.device)))

        self.kv_valid, self.shifts = [of(valid) for valid in self.kv_valid], [of(shift) for shift in self.shifts]
        self.order = rows if self.order is None else self.order[rows]
        for ffn in self.ffn.values():
            ffn.take(rows)
        if self.rows is not None:
            self.rows.take(rows.tolist())

    def fork(self) -> PromptState:
        """The same turn for a copied KV cache: what was run so far stays on this one's account."""
        twin = copy.copy(self)
        twin.kv_valid, twin.shifts = list(self.kv_valid), list(self.shifts)
        twin.neurons, twin.ffn = dict(self.neurons), {layer: copy.copy(ffn) for layer, ffn in self.ffn.items()}
        samples = len(self.prompt.lengths)
        twin.ledger, twin.prefills = Ledger(samples), 0
        twin.counters = 0, 0, 0, [0] * samples, [0.0] * samples, self.rows and self.rows.fork()
        return twin

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
        chosen: dict[str, Any] = self.rows.of_sample(row, len(self.layouts)) if self.rows else {}
        return SampleTrace(
            prompt_tokens=self.prompt.lengths[row],
            image_tokens=self.prompt.visual_counts[row],
            images=len(self.images.rows[row]),
            shown=self.images.rows[row],
            visual_tokens=[entering[id(layout)] for layout in self.layouts],
            llm_tokens=[layout.lengths[row] for layout in self.layouts],
            kv_lengths=[lengths[row] for lengths in self.kv_lengths],
            kv_bytes=self._rows_stored(row) * self.kv_row_bytes,
            dense_kv_bytes=(self._earlier(row) + self.prompt.lengths[row]) * len(self.layouts) * self.kv_row_bytes,
            neurons=PackedIndices([_row(neurons.get(layer), row) for layer in range(len(self.layouts))]),
            ffn_mode=next((mode for mode in FFN_MODES if mode in modes), "dense"),
            masked_steps=max((ffn.masked_steps for ffn in self.ffn.values()), default=0),
            vision_tokens=[sum(tokens[row]) for tokens in self.vision_tokens],
            vision_mlp_tokens=[tokens[row] for tokens in self.vision_mlp_tokens],
            vision_pairs=[sum(own * own for own in tokens[row]) for tokens in self.vision_tokens],
            projected_tokens=self.projected_tokens[row],
            head_positions=self.head_positions[row],
            decode_steps=self.decode_steps,
            decode_reach=self.decode_reach,
            discarded_tokens=self.discarded_tokens,
            prefills=self.prefills,
            past_tokens=self._earlier(row),
            past_kv=[past.lengths[row] for past in self.past if past.lengths],
            overhead_flops=self.ledger.flops[row] + sum(chosen.get("choice_flops", ())),
            predictor_weights=self.predictor_weights,
            zeroed_kv=self.zeroed_kv[row],
            guide=guide,
            **chosen,
        )

    def _rows_stored(self, row: int) -> int:
        """KV rows of a sample after prefill, all layers together; heads of one layer are padded to the longest."""
        longest = self.rows.longest if self.rows else {}
        return sum(
            longest[layer][row] if layer in longest else lengths[row] for layer, lengths in enumerate(self.kv_lengths)
        )

    def _earlier(self, row: int) -> int:
        return self.past_tokens[row] if self.past_tokens else 0


def _row(chosen: Tensor | None, row: int) -> Tensor | None:
    """One sample's neurons; None if it has left the batch before any were chosen."""
    return None if chosen is None or row >= len(chosen) else chosen[row]


def _unique(layouts: list[Layout]) -> list[Any]:
    return list({id(layout): layout for layout in layouts}.values())
