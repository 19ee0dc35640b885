"""Which tokens are in the sequence right now, and how to get from one sequence to a shorter one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from corematching.errors import UserError
from corematching.methods.base import Keep, Replace
from corematching.methods.selection import tokens_at


@dataclass(frozen=True)
class Past:
    """What one layer's KV cache held before a turn."""

    rows: int = 0
    valid: Tensor | None = None
    """Bool [B, rows]; None when all are."""
    shift: Tensor | None = None
    """Long [B, 1]: how far the layer's positions lie below the original ones; None = 0."""
    lengths: tuple[int, ...] = ()
    """Valid rows per sample; empty: none."""


NO_PAST = Past()
"""Of a first turn."""


@dataclass(frozen=True, eq=False)
class Stream:
    """What goes from layer to layer, [B, n, d] each."""

    hidden: Tensor
    coming: tuple[Tensor, ...] = ()
    """Rows that the next layers' outputs get added, one per layer (deepstack); zeros where there is no visual token."""

    def after_layer(self, hidden: Tensor) -> Stream:
        """What a layer's output becomes."""
        return Stream(hidden + self.coming[0], self.coming[1:]) if self.coming else Stream(hidden)

    def of(self, change: Callable[[Tensor], Tensor]) -> Stream:
        """The same change made to every tensor."""
        return Stream(change(self.hidden), tuple(map(change, self.coming)))


@dataclass(frozen=True, eq=False)
class Layout:
    """The current sequence of a left-padded batch, [B, n] throughout."""

    source: Tensor
    """Index in the original prompt (-1: padding, or no single origin)."""
    visual_id: Tensor
    """Original visual-token index; -1 for visual tokens without one, -2 for text and padding."""
    place_id: Tensor
    """Original index of the visual token whose place it stands at; -2 for text and padding."""
    positions: Tensor
    """Position ids that the rotary embedding reads: [B, n], or [R, B, n] where it reads several rows."""
    valid: Tensor
    """Bool: False on padding."""
    lengths: list[int]
    """Valid tokens per sample, on the host."""
    visual_counts: list[int]
    """Visual tokens per sample, on the host."""
    start: Tensor | None = None
    """Long [B, 1]: position id of each sample's first token; None = 0."""

    def __post_init__(self) -> None:
        assert self.positions.shape[-2:] == self.valid.shape

    @classmethod
    def of_prompt(
        cls,
        input_ids: Tensor,
        valid: Tensor,
        positions: Tensor,
        image_token_id: int,
        start: Tensor | None = None,
        source: Tensor | None = None,
    ) -> Layout:
        """Layout before any reduction; synchronises once to learn the counts."""
        is_visual = (input_ids == image_token_id) & valid
        index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        visual_id = (is_visual.long().cumsum(1) - 1).masked_fill(~is_visual, -2)
        return cls(
            source=(index if source is None else source).masked_fill(~valid, -1),
            visual_id=visual_id,
            place_id=visual_id,
            positions=positions.expand(*positions.shape[:-2], *input_ids.shape),
            valid=valid,
            lengths=valid.sum(1).tolist(),
            visual_counts=is_visual.sum(1).tolist(),
            start=start,
        )

    def of_sample(self, row: int) -> Layout:
        """One sample's sequence, as wide as the batch's."""
        own = slice(row, row + 1)
        names = ("source", "visual_id", "place_id", "valid", "lengths", "visual_counts")
        parts: dict[str, Any] = {name: getattr(self, name)[own] for name in names}
        start = None if self.start is None else self.start[own]
        return replace(self, positions=self.positions[..., own, :], start=start, **parts)

    @property
    def padded(self) -> bool:
        return any(length != self.valid.shape[1] for length in self.lengths)

    @cached_property
    def visual(self) -> Tensor:
        """Long [B, V]: positions of visual tokens, ascending; padded slots repeat some position."""
        return _last_true(self.visual_id > -2, max(self.visual_counts), from_front=True)

    @cached_property
    def visual_valid(self) -> Tensor:
        """Bool [B, V]."""
        counts = torch.tensor(self.visual_counts, device=self.valid.device)
        return torch.arange(max(self.visual_counts), device=self.valid.device) < counts[:, None]

    def keeps_everything(self, decision: Keep) -> bool:
        """Whether a decision drops nothing (synchronises only if the method did not count)."""
        return self._counts(decision) == self.visual_counts

    def _counts(self, decision: Keep) -> list[int]:
        if decision.counts is not None:
            return decision.counts
        return (decision.mask & self.visual_valid).sum(1).tolist()

    def drop(self, decision: Keep, stream: Stream, renumber: bool) -> tuple[Layout, Stream]:
        """Apply a :class:`Keep`: the shorter layout and stream."""
        counts = self._counts(decision)
        slot_kept = (decision.mask & self.visual_valid).to(torch.int8)
        stays = self.valid.to(torch.int8)
        # Padded slots point at some real position; adding 0 there leaves it alone.
        stays = stays.scatter_add(1, self.visual, (slot_kept - 1) * self.visual_valid.to(torch.int8)) > 0
        lengths = [
            length - now + kept for length, now, kept in zip(self.lengths, self.visual_counts, counts, strict=True)
        ]
        index = _last_true(stays, max(lengths))
        layout = self._take(index, lengths, counts)
        return layout.renumbered() if renumber else layout, stream.of(partial(tokens_at, index=index))

    def _take(self, index: Tensor, lengths: list[int], visual_counts: list[int]) -> Layout:
        width = index.shape[1]
        valid = torch.arange(width, device=index.device) >= width - torch.tensor(lengths, device=index.device)[:, None]
        return Layout(
            source=self.source.gather(1, index).masked_fill(~valid, -1),
            visual_id=self.visual_id.gather(1, index).masked_fill(~valid, -2),
            place_id=self.place_id.gather(1, index).masked_fill(~valid, -2),
            positions=positions_at(self.positions, index),
            valid=valid,
            lengths=lengths,
            visual_counts=visual_counts,
            start=self.start,
        )

    def renumbered(self) -> Layout:
        """The same tokens with consecutive position ids, from ``start`` on.

        Where positions are rows (time, height, width), they say where in the image a token lies, and stay.
        """
        if self.positions.dim() == 3:
            return self
        positions = (self.valid.long().cumsum(1) - 1).clamp(min=0)
        return replace(self, positions=positions if self.start is None else positions + self.start)

    def replace(self, decision: Replace, stream: Stream, renumber: bool) -> tuple[Layout, Stream]:
        """Apply a :class:`Replace`: text tokens and the new visual tokens, ordered by the slots these take."""
        origin = decision.origin
        slot = origin if decision.slot is None else decision.slot
        batch, width = origin.shape
        counts = [width] * batch if decision.counts is None else decision.counts
        real = torch.arange(width, device=origin.device) < torch.tensor(counts, device=origin.device)[:, None]
        place = self.visual.gather(1, slot.clamp(min=0))
        known = origin >= 0
        of_origin = self.visual.gather(1, origin.clamp(min=0))

        is_text = self.valid & (self.visual_id == -2)
        n = self.valid.shape[1]
        stays = torch.cat([is_text, real], 1)
        index = torch.arange(n, device=origin.device).expand(batch, n)
        # Padding and dropped tokens sort to the front, where left padding lives; ties keep the method's order.
        key = torch.cat([index, place], 1).masked_fill(~stays, -1)
        lengths = [length - now + k for length, now, k in zip(self.lengths, self.visual_counts, counts, strict=True)]
        order = key.argsort(dim=1, stable=True)[:, -max(lengths) :]
        merged = Layout(
            source=torch.cat([self.source, self.source.gather(1, of_origin).masked_fill(~known, -1)], 1),
            visual_id=torch.cat([self.visual_id, self.visual_id.gather(1, of_origin).masked_fill(~known, -1)], 1),
            place_id=torch.cat([self.place_id, self.place_id.gather(1, place)], 1),
            positions=torch.cat([self.positions, positions_at(self.positions, place)], -1),
            valid=stays,
            lengths=lengths,
            visual_counts=counts,
            start=self.start,
        )
        layout = merged._take(order, lengths, counts)
        new = Stream(decision.hidden, tuple(self._mixed(decision, rows) for rows in stream.coming))
        pairs = zip((stream.hidden, *stream.coming), (new.hidden, *new.coming), strict=True)
        hidden, *coming = (tokens_at(torch.cat([old, own.to(old.dtype)], 1), order) for old, own in pairs)
        return layout.renumbered() if renumber else layout, Stream(hidden, tuple(coming))

    def _mixed(self, decision: Replace, rows: Tensor) -> Tensor:
        """What the visual tokens' rows [B, n, d] become when the tokens are replaced: combined as they are."""
        if decision.mix is None:
            raise UserError(
                "this model adds visual features between layers: a method that combines tokens must say how "
                "(Replace.mix)"
            )
        return decision.mix(tokens_at(rows, self.visual))


def deepstack_rows(mask: Tensor | None, embeds: list[Tensor]) -> tuple[Tensor, ...]:
    """Per level: [B, n, d] of what a layer's output gets added; zeros where no visual token is.

    Parameters
    ----------
    mask
        Bool [B, n]: visual tokens.
    embeds
        Per level: [visual tokens of the batch, d], row by row.
    """
    assert mask is not None
    rows = []
    for level in embeds:
        added = torch.zeros(*mask.shape, level.shape[-1], dtype=level.dtype, device=mask.device)
        added[mask] = level.to(added.device)
        rows.append(added)
    return tuple(rows)


def positions_at(positions: Tensor, index: Tensor) -> Tensor:
    """Position ids, [B, n] or [R, B, n], at long [B, m]."""
    return positions.gather(-1, index.expand(*positions.shape[:-2], *index.shape))


def joined(past: Past, valid: Tensor | None, rows: int = 0) -> Tensor | None:
    """Bool [B, past + new] of earlier rows and new ones; None when all are valid.

    Parameters
    ----------
    valid
        Bool [B, new]; None when all are.
    rows
        How many new ones there are, if ``valid`` is None.
    """
    if past.valid is None and (valid is None or past.rows == 0):
        return valid
    known = past.valid if valid is None else valid
    assert known is not None
    before = past.valid if past.valid is not None else known.new_ones(known.shape[0], past.rows)
    new = valid if valid is not None else known.new_ones(known.shape[0], rows)
    return torch.cat([before, new], 1)


def _last_true(mask: Tensor, width: int, from_front: bool = False) -> Tensor:
    """Indices [B, width] of the True entries, ascending; rows with fewer are filled with False entries' indices.

    The filling stands before the True entries (as left padding does), or after them with ``from_front``.
    """
    key = (~mask if from_front else mask).to(torch.int8)
    order = key.argsort(dim=1, stable=True)
    return order[:, :width] if from_front else order[:, order.shape[1] - width :]
