"""The signals handed to methods; each is computed only when asked for, and its cost is booked as method overhead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from corematching.engine.ffn import down_weight, sliceable
from corematching.engine.layout import NO_PAST, Layout, Past, joined, positions_at
from corematching.engine.visual import PromptImages
from corematching.methods.selection import tokens_at
from corematching.models.families import ImageTokens


class Ledger:
    """Overhead in FLOPs of each sample (or image) of a batch; padding is nobody's."""

    def __init__(self, samples: int = 1) -> None:
        self.flops = [0.0] * samples
        self._spared: frozenset[int] = frozenset()

    def spend(self, flops: float | Sequence[float]) -> None:
        """Book what every sample costs alike, or one number per sample."""
        own = flops if isinstance(flops, Sequence) else [flops] * len(self.flops)
        for row, more in enumerate(own):
            self.flops[row] += 0 if row in self._spared else more

    def spend_on(self, row: int, flops: float) -> None:
        """Book what one sample alone costs."""
        self.spend([flops if other == row else 0.0 for other in range(len(self.flops))])

    @contextmanager
    def charging(self, samples: Sequence[bool]) -> Iterator[None]:
        """Book only on some samples: on the others, nothing would be spent if they ran alone."""
        before = self._spared
        self._spared = before | {row for row, charged in enumerate(samples) if not charged}
        try:
            yield
        finally:
            self._spared = before


@dataclass
class Prompt:
    """See :class:`corematching.methods.views.PromptView`."""

    input_ids: Tensor
    embeds: Tensor
    visual_mask: Tensor
    valid: Tensor
    lengths: list[int]
    image_counts: list[int]
    shown: PromptImages
    notes: dict[Any, Any] = field(default_factory=dict)

    @property
    def images(self) -> list[list[ImageTokens]]:
        return self.shown.rows

    @cached_property
    def question_lengths(self) -> list[int]:
        index = torch.arange(self.valid.shape[1], device=self.valid.device)
        after = self.valid & (index > (index * self.visual_mask).amax(1, keepdim=True))
        return after.sum(1).tolist()


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [B, H, R, hd] with cos and sin [B, R, hd] (half-split convention)."""
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def heads_of(attn: Any, part: str, hidden: Tensor) -> Tensor:
    """Queries ("q") or keys ("k") before rotation: normed hidden states [B, n, d] -> [B, H, n, hd]."""
    heads = getattr(attn, f"{part}_proj")(hidden).unflatten(-1, (-1, attn.head_dim))
    norm = getattr(attn, f"{part}_norm", None)
    return (heads if norm is None else norm(heads)).transpose(1, 2)


@dataclass
class AttentionSignals:
    """Recomputes query rows (and, without a cache, keys) of one decoder layer from that layer's own input."""

    block: nn.Module
    hidden: Tensor
    layout: Layout
    rotary: nn.Module
    ledger: Ledger
    cached_keys: Tensor | None = None
    past: Past = NO_PAST
    """What the layer's cache held before this turn."""
    past_keys: Tensor | None = None
    """[B, H_kv, past rows, hd]."""

    @property
    def positions(self) -> Tensor:
        """Position ids, [B, n] or [R, B, n], under this layer's numbering."""
        return self.layout.positions if self.past.shift is None else self.layout.positions - self.past.shift

    @property
    def reached(self) -> list[int]:
        """Tokens per sample that may be attended to, earlier turns' included."""
        before = self.past.lengths or [0] * len(self.layout.lengths)
        return [old + own for old, own in zip(before, self.layout.lengths, strict=True)]

    @property
    def attn(self) -> Any:
        return self.block.self_attn

    def of_sample(self, row: int) -> AttentionSignals:
        """The same of one sample alone, with a ledger of its own."""
        own, past = slice(row, row + 1), self.past
        shift = None if past.shift is None else past.shift[..., own, :]
        past = replace(past, shift=shift, lengths=past.lengths[own])
        layout = self.layout.of_sample(row)
        return AttentionSignals(self.block, self.hidden[own], layout, self.rotary, Ledger(), past=past)

    def _project(self, part: str, hidden: Tensor, counts: list[int]) -> Tensor:
        linear = getattr(self.attn, f"{part}_proj")
        self.ledger.spend([2 * count * linear.in_features * linear.out_features for count in counts])
        return heads_of(self.attn, part, self.block.input_layernorm(hidden))  # type: ignore[operator]

    def queries(self, rows: Tensor, counts: list[int] | None = None, rotated: bool = True) -> Tensor:
        """[B, H, R, hd] for rows [B, R], of which ``counts[b]`` (default: all) are sample b's own."""
        hidden = tokens_at(self.hidden, rows)
        projected = self._project("q", hidden, self.own(rows, counts))
        if not rotated:
            return projected
        return rotate(projected, *self.rotary(hidden, position_ids=positions_at(self.positions, rows)))

    @staticmethod
    def own(rows: Tensor, counts: list[int] | None) -> list[int]:
        """Rows per sample that are not padding."""
        return [rows.shape[1]] * rows.shape[0] if counts is None else counts

    def keys(self) -> Tensor:
        """[B, H, n, hd], repeated to the query heads."""
        keys = self.cached_keys
        if keys is None:
            cos, sin = self.rotary(self.hidden, position_ids=self.positions)
            keys = rotate(self._project("k", self.hidden, self.layout.lengths), cos, sin)
        return keys.repeat_interleave(self.attn.num_key_value_groups, dim=1)

    def last_row(self) -> Tensor:
        """Long [B, 1]: the last position (prompts are left-padded)."""
        batch, length = self.layout.valid.shape
        return torch.full((batch, 1), length - 1, device=self.hidden.device, dtype=torch.long)

    def probabilities(self, rows: Tensor, counts: list[int] | None = None) -> Tensor:
        """[B, H, R, n], softmax in float32 over valid positions up to each row, those of earlier turns included."""
        queries, keys, before = self.queries(rows, counts), self.keys(), self.past.rows
        if self.past_keys is not None:
            keys = torch.cat([self.past_keys.repeat_interleave(self.attn.num_key_value_groups, dim=1), keys], 2)
        pairs = zip(self.own(rows, counts), self.reached, strict=True)
        self.ledger.spend([2 * queries.shape[1] * own * length * keys.shape[3] for own, length in pairs])
        logits = (queries @ keys.transpose(2, 3)).float() * self.attn.scaling
        index = torch.arange(keys.shape[2], device=rows.device)
        valid = joined(self.past, self.layout.valid)
        visible = (index <= rows[..., None] + before) & valid[:, None]  # type: ignore[index]
        return logits.masked_fill(~visible[:, None], torch.finfo(logits.dtype).min).softmax(-1)[..., before:]


@dataclass
class LayerSignals:
    """See :class:`corematching.methods.views.LayerView`."""

    layer: int
    prompt: Prompt
    hidden: Tensor
    layout: Layout
    ledger: Ledger
    _attention: dict[int, AttentionSignals]
    _activations: Tensor | None = None
    _attended: Tensor | None = None
    _norm: Any = None

    @property
    def valid(self) -> Tensor:
        return self.layout.valid

    @property
    def visual_mask(self) -> Tensor:
        return self.layout.visual_id > -2

    @property
    def visual(self) -> Tensor:
        return self.layout.visual

    @property
    def visual_valid(self) -> Tensor:
        return self.layout.visual_valid

    @property
    def lengths(self) -> list[int]:
        return self.layout.lengths

    @property
    def visual_counts(self) -> list[int]:
        return self.layout.visual_counts

    @property
    def origin(self) -> Tensor:
        return self.layout.visual_id.gather(1, self.layout.visual)

    @property
    def source(self) -> Tensor:
        return self.layout.source

    def fact(self, name: str) -> Tensor:
        return self.prompt.shown.fact(name, self.layout.place_id.gather(1, self.layout.visual))

    def _signals(self, layer: int) -> AttentionSignals:
        if layer not in self._attention:
            raise ValueError(f"attention of layer {layer} is not known at the input of layer {self.layer}")
        return self._attention[layer]

    def attention(self, layer: int, rows: Tensor | None = None, counts: list[int] | None = None) -> Tensor:
        signals = self._signals(layer)
        return signals.probabilities(signals.last_row() if rows is None else rows, counts)

    def queries_keys(
        self, layer: int, rows: Tensor | None = None, counts: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        signals = self._signals(layer)
        return signals.queries(signals.last_row() if rows is None else rows, counts), signals.keys()

    def activations(self) -> Tensor:
        if self._activations is None:
            raise ValueError("this stage did not ask for activations: declare BeforeLayer(..., activations=True)")
        return self._activations

    @property
    def entered(self) -> Tensor:
        return self._signals(self.layer - 1).hidden

    def normed(self) -> Tensor:
        return self._norm(self.hidden)

    def attended(self) -> Tensor:
        if self._attended is None:
            raise ValueError("this stage did not ask for attended states: declare BeforeLayer(..., attended=True)")
        return self._attended

    def position_kernel(self, layer: int, rows: Tensor, counts: list[int] | None = None) -> Tensor:
        signals = self._signals(layer)
        ones = self.hidden.new_ones(rows.shape[0], 1, self.layout.valid.shape[1], signals.attn.head_dim)
        rotated = rotate(ones, *signals.rotary(self.hidden, position_ids=self.layout.positions))[:, 0]
        of_rows = tokens_at(rotated, rows)
        pairs = zip(signals.own(rows, counts), self.layout.lengths, strict=True)
        self.spend([2 * own * length * rotated.shape[2] for own, length in pairs])
        return of_rows @ rotated.transpose(1, 2) * signals.attn.scaling

    def gather(self, values: Tensor) -> Tensor:
        index = self.layout.visual
        return values.gather(1, index) if values.dim() == 2 else tokens_at(values, index)

    def spend(self, flops: float | Sequence[float]) -> None:
        self.ledger.spend(flops)

    def charging(self, samples: Sequence[bool]) -> AbstractContextManager[None]:
        return self.ledger.charging(samples)


@dataclass
class KVSignals:
    """See :class:`corematching.methods.views.KVView`."""

    layer: int
    keys: Tensor
    values: Tensor
    layout: Layout
    prompt: Prompt
    ledger: Ledger
    _attention: AttentionSignals
    _activations: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        return self.layout.valid

    @property
    def visual_mask(self) -> Tensor:
        return self.layout.visual_id > -2

    @property
    def lengths(self) -> list[int]:
        return self.layout.lengths

    @property
    def visual_counts(self) -> list[int]:
        return self.layout.visual_counts

    @property
    def source(self) -> Tensor:
        return self.layout.source

    def queries(self, rows: Tensor, counts: list[int] | None = None) -> Tensor:
        return self._attention.queries(rows.expand(self.layout.valid.shape[0], -1), counts)

    def activations(self) -> Tensor:
        if self._activations is None:
            raise ValueError("this stage did not ask for activations: declare AfterPrefill(..., activations=True)")
        return self._activations

    def spend(self, flops: float | Sequence[float]) -> None:
        self.ledger.spend(flops)


@dataclass
class FFNSignals:
    """See :class:`corematching.methods.views.FFNView`."""

    layer: int
    activations: Tensor
    layout: Layout
    prompt: Prompt
    mlp: nn.Module
    ledger: Ledger

    @property
    def valid(self) -> Tensor:
        return self.layout.valid

    @property
    def visual_mask(self) -> Tensor:
        return self.layout.visual_id > -2

    @property
    def down_weight(self) -> Tensor:
        weight = down_weight(self.mlp, self.activations)
        if not sliceable(self.mlp):
            self.spend(2 * weight.numel() * weight.shape[1])
        return weight

    def spend(self, flops: float | Sequence[float]) -> None:
        self.ledger.spend(flops)
