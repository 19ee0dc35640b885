"""Vision-side methods on families that pack the tower's features: they choose among an image's packed tokens.

The stock model makes all tokens of an image; the method is asked about one image at a time, newlines included, and what
it drops leaves before decoder layer 0. Position ids follow from what stays, as where the sequence simply is shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from corematching.engine.layout import Layout, Stream
from corematching.engine.state import PromptState
from corematching.errors import UserError
from corematching.methods.base import Keep, Replace
from corematching.methods.selection import tokens_at
from corematching.models.families import NEWLINE, ImageTokens, VisualTokens

if TYPE_CHECKING:
    from corematching.engine.session import Session


@dataclass
class PackedImage:
    """One image's packed tokens: what a :class:`corematching.methods.views.VisionView` can offer of them (N = 1)."""

    projected: Tensor
    """[1, P, d]."""
    attention: dict[int, Tensor]
    """Per tower layer: [1, H, P]."""
    depth: int
    book: Callable[[float], None]

    @property
    def features(self) -> Tensor:
        return self.projected

    def cls_attention(self, layer: int) -> Tensor:
        return self.attention[layer % self.depth]

    def spend(self, flops: float | Sequence[float]) -> None:
        self.book(flops[0] if isinstance(flops, Sequence) else flops)

    def __getattr__(self, name: str) -> Any:
        raise UserError(f"the tower's {name} cannot be asked for where visual tokens are packed")


def choose(session: Session, state: PromptState, stream: Stream, layout: Layout) -> tuple[Stream, Layout]:
    """Ask the method about every image of a prompt, and let go what it does not keep."""
    assert session.output is not None
    assert session.tower_attention is not None
    scores = session.tower_attention.of_tokens()
    first = _firsts(state)
    rows = []
    for row, (own, numbers) in enumerate(zip(state.images.rows, state.images.numbers, strict=True)):
        visual, start, parts = tokens_at(stream.hidden[row : row + 1], layout.visual[row : row + 1]), 0, []
        for image, number in zip(own, numbers, strict=True):
            attention = {
                layer: with_newlines(every[:, first[number] : first[number] + image.count], image)[None]
                for layer, every in scores.items()
            }
            view = PackedImage(
                visual[:, start : start + image.count],
                attention,
                session.geometry.vision_depth,
                partial(state.ledger.spend_on, row),
            )
            view.spend(session.tower_attention.flops(image.patches))
            parts.append((start, image.count, session.output.select(view)))  # type: ignore[arg-type]
            start += image.count
        rows.append(parts)
    decisions = [decision for parts in rows for _, _, decision in parts if decision is not None]
    if not decisions:
        return stream, layout
    if all(isinstance(decision, Keep) for decision in decisions):
        keep = _joined_keep(rows, layout)
        if not layout.keeps_everything(keep):
            layout, stream = layout.drop(keep, stream, session.output.renumber)
        return stream, layout
    layout, stream = layout.replace(_joined_replace(rows, stream, layout), stream, session.output.renumber)
    return stream, layout


def with_newlines(scores: Tensor, image: ImageTokens) -> Tensor:
    """Scores [H, n] of an image's tokens with those of newlines filled in: the mean of the row, or tile, each ends."""
    tokens = VisualTokens.of([image])
    scores = scores.clone()
    for index in (tokens.kind == NEWLINE).nonzero()[:, 0].tolist():
        ended = (tokens.tile == tokens.tile[index]) & (tokens.kind != NEWLINE)
        if image.tiles[int(tokens.tile[index])].newline == "row":
            ended &= tokens.row == tokens.row[index]
        scores[:, index] = scores[:, ended.to(scores.device)].mean(1)
    return scores


def _firsts(state: PromptState) -> dict[int, int]:
    """Where the tokens of each image that came with the batch begin among those of all."""
    counts = {
        number: image.count
        for own, numbers in zip(state.images.rows, state.images.numbers, strict=True)
        for image, number in zip(own, numbers, strict=True)
    }
    first, firsts = 0, {}
    for number in sorted(counts):
        firsts[number] = first
        first += counts[number]
    return firsts


Part = tuple[int, int, Keep | Replace | None]
"""An image's first visual slot, its tokens, and what was decided about it."""


def _joined_keep(rows: Sequence[Sequence[Part]], layout: Layout) -> Keep:
    mask = layout.visual_valid.clone()
    for row, parts in enumerate(rows):
        for start, count, decision in parts:
            if decision is not None:
                mask[row, start : start + count] = decision.mask[0]  # type: ignore[union-attr]
    return Keep(mask)


def _joined_replace(rows: Sequence[Sequence[Part]], stream: Stream, layout: Layout) -> Replace:
    """One decision about all images; those left alone keep their tokens."""

    def mix(values: Tensor) -> Tensor:
        samples = [
            torch.cat([values.new_zeros(0, values.shape[2]), *(_mixed(own[None], part)[0] for part in parts)])
            for own, parts in zip(values, rows, strict=True)
        ]
        return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)

    visual = tokens_at(stream.hidden, layout.visual)
    origins = [
        torch.cat([layout.visual.new_zeros(0), *(_origin(part).to(layout.visual.device) for part in parts)])
        for parts in rows
    ]
    origin = torch.nn.utils.rnn.pad_sequence(origins, batch_first=True, padding_value=-1)
    return Replace(mix(visual), origin, counts=[len(own) for own in origins], mix=mix)


def _mixed(values: Tensor, part: Part) -> Tensor:
    start, count, decision = part
    own = values[:, start : start + count]
    if decision is None:
        return own
    if isinstance(decision, Keep):
        return own[:, decision.mask[0]]
    if decision.mix is None:
        raise UserError("a method that combines packed tokens must say how (Replace.mix)")
    return decision.mix(own)


def _origin(part: Part) -> Tensor:
    start, count, decision = part
    if decision is None:
        return start + torch.arange(count)
    own = decision.mask[0].nonzero()[:, 0] if isinstance(decision, Keep) else decision.origin[0]
    return own + start
