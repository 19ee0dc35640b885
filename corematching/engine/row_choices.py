"""What a turn's decode steps choose KV rows from, and what they have read: the record that the trace is built from.

It lives in the turn's state, so it is copied, reordered and cut with the KV cache; who reads rows by it is
:mod:`corematching.engine.rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from corematching.methods.base import KeepKV

Count = float | Tensor
"""Numbers that may still lie on the device."""


@dataclass
class Step:
    """What one decode step read, per row of the batch as it was then."""

    rows: dict[int, list[Count]] = field(default_factory=dict)
    """Per layer and sample: rows read, on average over the KV heads."""
    mass: dict[int, list[Count]] = field(default_factory=dict)
    """Per layer and sample: share of dense attention on these rows; only while it is measured."""
    flops: list[float] = field(default_factory=list)
    """Per sample: what choosing took."""
    bytes: list[float] = field(default_factory=list)
    """Per sample: keys (and whatever else) read for choosing, apart from the rows attended to."""


@dataclass
class RowChoices:
    """What one turn's decode steps choose from and have read; per row of the batch as it is now."""

    starts: list[list[int]] = field(default_factory=list)
    """Per sample and layer: the cache row where its own ones begin (padding stands before)."""
    heads: dict[int, list[list[int]]] = field(default_factory=dict)
    """Of layers whose heads keep different numbers of rows, per sample: where each KV head's rows begin."""
    longest: dict[int, list[int]] = field(default_factory=dict)
    """Of the same, per sample of the prefill: rows of the longest head, to which the others are padded."""
    dropped: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """Of measured layers that dropped rows, per sample: keys [H_kv, n, hd] of all rows, and bool [H_kv, n] of those
    that stayed."""
    memory: list[dict[Any, Any]] = field(default_factory=list)
    """Per sample: what the method notes. Values are replaced, never written into."""
    steps: list[Step] = field(default_factory=list)

    def open_step(self) -> None:
        """A decode step begins."""
        batch = len(self.memory)
        self.steps.append(Step(flops=[0.0] * batch, bytes=[0.0] * batch))

    def note_heads(self, layer: int, valid: Tensor) -> list[int]:
        """A layer's KV heads keep different numbers of rows, bool [B, H_kv, K]: their rounded mean per sample."""
        counts = valid.sum(2).tolist()
        self.longest[layer] = [max(own) for own in counts]
        self.heads[layer] = [[valid.shape[2] - count for count in own] for own in counts]
        return [round(sum(own) / len(own)) for own in counts]

    def note_dropped(self, layer: int, keys: Tensor, decision: KeepKV, lengths: Sequence[int]) -> None:
        """A measured layer is about to keep some rows only of keys [B, H_kv, n, hd]."""
        stayed = torch.zeros(keys.shape[:3], dtype=torch.int8, device=keys.device)
        valid = torch.ones_like(decision.index) if decision.valid is None else decision.valid
        valid = valid if valid.dim() == 3 else valid[:, None].expand_as(decision.index)
        stayed = stayed.scatter_add(2, decision.index, valid.to(torch.int8)) > 0
        self.dropped[layer] = [
            (own[:, -length:], mark[:, -length:]) for own, mark, length in zip(keys, stayed, lengths, strict=True)
        ]

    def take(self, rows: Sequence[int]) -> None:
        """The batch is now made of these rows of what it was."""
        self.starts = [self.starts[row] for row in rows]
        self.memory = [dict(self.memory[row]) for row in rows]
        self.heads = {layer: [starts[row] for row in rows] for layer, starts in self.heads.items()}
        self.dropped = {layer: [own[row] for row in rows] for layer, own in self.dropped.items()}

    def snapshot(self) -> RowChoices:
        """As it is now, whatever comes."""
        return RowChoices(
            list(self.starts),
            dict(self.heads),
            dict(self.longest),
            dict(self.dropped),
            [dict(own) for own in self.memory],
            list(self.steps),
        )

    def fork(self) -> RowChoices:
        """For a copied KV cache: steps so far stay on this one's account."""
        twin = self.snapshot()
        twin.steps = []
        return twin

    def of_sample(self, row: int, depth: int) -> dict[str, list]:
        """A sample's part of the trace, as keyword arguments of :class:`~corematching.engine.trace.SampleTrace`."""
        own = [step for step in self.steps if row < len(step.flops)]

        def by_layer(name: str) -> list[list[float]]:
            parts = [getattr(step, name) for step in own]
            found = [[float(part[layer][row]) for part in parts if layer in part] for layer in range(depth)]
            return found if any(found) else []

        return {
            "rows_read": by_layer("rows"),
            "mass_read": by_layer("mass"),
            "choice_flops": [step.flops[row] for step in own],
            "choice_bytes": [step.bytes[row] for step in own],
        }
