"""Prompts that begin alike: their common beginning runs once, and each prompt's own end attends to it.

In a LLaVA prompt the system text and the image stand before the question, so the vision features, the hidden states and
the keys and values of that beginning do not depend on the question. :class:`Sharing` says which rows of a batch begin
alike; :class:`SharedRun` carries a prefill through decoder layers with every beginning computed once. What a stage or
the KV cache needs of whole rows is put together again, in the order of the left-padded batch, so that neither methods
nor the rest of the engine know about any of this.

How far a prefill is shared follows from what its stages do: after a stage has changed the sequence, the rows of a group
still begin alike only if they kept the same tokens, which is looked at, not declared.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling

from corematching.engine.cache import Rows, with_spare
from corematching.engine.layout import Layout, Stream
from corematching.engine.state import PromptState
from corematching.engine.vision import Remembered, TowerRun, remembered_tower, run_tower
from corematching.methods.base import BeforeLayer, ChooseNeurons, Guide, Stage, VisionBlocks, VisionDrop, VisionOutput
from corematching.models.families import Family


@dataclass
class Parts:
    """A per-token tensor in two parts: the beginnings [G, P, ...] and the rows' own ends [B, S, ...]."""

    begin: Tensor
    end: Tensor


@dataclass
class LayerOutput:
    """What one decoder layer made of a shared sequence."""

    hidden: Parts
    keys: Tensor
    """[B, H_kv, > n, hd], whole rows in batch order, and room for decoded ones."""
    values: Tensor
    notes: dict[str, Parts]
    """Signals that hooks noted in this layer: "activations", "attended"."""


@dataclass
class Sharing:
    """Which rows of a batch begin alike, and what has been computed for the batch as it is, before any reduction.

    One object serves all methods that answer the same batch: whoever comes first computes, the others find it here.

    Parameters
    ----------
    groups
        Per row: the number of its group, counted from 0 by first appearance.
    ends
        Per row: how many tokens at its end are its own. Visual tokens are all in the beginning.
    images
        Per row: its images, as indices into the pixel values of the batch, which hold every image once.
    remember
        Decoder layers whose output another method of this batch is going to ask for.
    features
        States of the vision tower that earlier passes over these images have left; None: none are kept.
    """

    groups: Sequence[int]
    ends: Sequence[int]
    images: Sequence[Sequence[int]]
    remember: frozenset[int] = frozenset()
    features: Remembered | None = None
    memory: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        valid: Tensor,
        images: Sequence[Sequence[int]],
        image_token: int,
        remember: frozenset[int] = frozenset(),
        features: Remembered | None = None,
    ) -> Sharing:
        """Find out which prompts of a left-padded batch [B, n] begin alike.

        Rows are grouped by their images; a row's beginning is what all prompts of its group have in common, or, where
        that does not hold all visual tokens, everything but its last token, in a group of its own.
        """
        rows = [ids[keep].tolist() for ids, keep in zip(input_ids.cpu(), valid.bool().cpu(), strict=True)]
        members: dict[Any, list[int]] = {}
        for row, own in enumerate(images):
            members.setdefault(tuple(own) or ("text", row), []).append(row)
        begins = [0] * len(rows)
        for key, group in list(members.items()):
            common = min(_alike_until(rows[group[0]], rows[row]) for row in group)
            if len(group) > 1 and any(image_token in rows[row][common:] for row in group):
                del members[key]
                members.update({("own", row): [row] for row in group})
                common = max(map(len, rows))
            for row in group:
                begins[row] = min(common, len(rows[row]) - 1)
        order = {row: key for key, group in members.items() for row in group}
        numbers: dict[Any, int] = {}
        groups = [numbers.setdefault(order[row], len(numbers)) for row in range(len(rows))]
        ends = [len(row) - begin for row, begin in zip(rows, begins, strict=True)]
        return cls(groups, ends, images, remember, features)

    @property
    def pays(self) -> bool:
        """Whether anything is shared: by several rows, or by several methods."""
        return len(set(self.groups)) < len(self.groups) or bool(self.remember)

    @property
    def firsts(self) -> list[int]:
        """Per group: the first of its rows."""
        return [list(self.groups).index(group) for group in range(max(self.groups) + 1)]

    @property
    def shown(self) -> list[int]:
        """Image of every (row, place), row by row."""
        return [image for own in self.images for image in own]


def _alike_until(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def common_layers(stages: Sequence[Sequence[Stage]], depth: int) -> frozenset[int]:
    """Decoder layers that several methods, given by their stages, run on the prompt as it is."""
    reach = [_unreduced(own, depth) for own in stages]
    return frozenset(layer for layer in range(depth) if sum(layer < first for first in reach) > 1)


def _unreduced(stages: Sequence[Stage], depth: int) -> int:
    """How many decoder layers see a prompt as it is."""
    if any(isinstance(stage, VisionBlocks | VisionDrop | VisionOutput | Guide) for stage in stages):
        return 0
    return min((stage.layer for stage in stages if isinstance(stage, BeforeLayer)), default=depth)


def most_asked(stages: Sequence[Stage]) -> tuple[bool, int]:
    """How much a method asks for, to be compared: who asks for most computes for those who ask for less.

    First the states of the vision tower, then signals of decoder layers, by the number of layers.
    """
    tower = any(isinstance(stage, VisionOutput) for stage in stages)
    inside = any(isinstance(stage, VisionBlocks | VisionDrop) for stage in stages)
    signals = sum(isinstance(stage, ChooseNeurons) or getattr(stage, "activations", False) for stage in stages)
    return tower and not inside, signals


def can_share(model: Any) -> bool:
    """Whether the method installed on ``model`` leaves prompts to it alone.

    A guide reads them itself; a stock tower must run where its attention is asked for.
    """
    session = model._corematching
    return session.guide is None and session.tower_attention is None


@contextmanager
def sharing_prompts(model: Any, sharing: Sharing) -> Iterator[None]:
    """Let the next prompt's rows share their beginnings under the method installed on ``model``."""
    session = model._corematching
    base = session.family.base(model)
    shadow = vars(base).get("get_image_features")
    session.sharing = sharing
    if not session.acts_on_tower:
        features = _once_per_image(model, session.family, base.get_image_features, sharing)
        object.__setattr__(base, "get_image_features", features)
    try:
        yield
    finally:
        session.sharing = None
        if not session.acts_on_tower:
            object.__delattr__(base, "get_image_features")
            if shadow is not None:
                object.__setattr__(base, "get_image_features", shadow)


def _once_per_image(model: Any, family: Family, stock: Callable, sharing: Sharing) -> Callable:
    """Image features of the stock model, computed once for an image that several rows show."""

    @functools.wraps(stock)
    def features(pixel_values: Tensor, **kwargs: Any) -> Any:
        if "features" not in sharing.memory:
            tower = sharing.memory.get("tower")
            if tower is None and sharing.features is not None:
                tower = tower_of(model, family, pixel_values, None, sharing)
            found = tower.projected if tower else stock(pixel_values=pixel_values, **kwargs).pooler_output
            sharing.memory["features"] = found
        found = sharing.memory["features"]
        return BaseModelOutputWithPooling(pooler_output=[found[image] for image in sharing.shown])  # type: ignore[arg-type]

    return features


def tower_of(
    model: Any, family: Family, pixels: Tensor, blocks: VisionBlocks | VisionDrop | None, sharing: Sharing | None
) -> TowerRun:
    """A pass of the vision tower; methods that do not act inside it share one."""
    if sharing is None or blocks is not None:
        return run_tower(model, family, pixels, blocks)
    if "tower" not in sharing.memory:
        known = sharing.features
        sharing.memory["tower"] = (
            remembered_tower(model, family, pixels, known) if known else run_tower(model, family, pixels, None)
        )
    found = sharing.memory["tower"]
    return found.of_images(range(len(found.origin)))


class SharedRun:
    """A stretch of decoder layers between two reductions, over a batch whose rows begin alike.

    Parameters
    ----------
    decoder
        The text decoder.
    sharing
        Who shares what.
    layout, hidden
        The sequence, [B, n] and [B, n, d], as it enters the stretch.
    """

    def __init__(self, decoder: Any, sharing: Sharing, layout: Layout, hidden: Tensor, memory: dict | None) -> None:
        self.decoder, self.sharing, self.layout = decoder, sharing, layout
        self.memory = memory
        """Where layer outputs of the unreduced sequence are looked up and left; None after a reduction."""
        self.width = hidden.shape[1]
        self.ends = list(sharing.ends)
        self.begins = [layout.lengths[row] - self.ends[row] for row in sharing.firsts]
        """Per group: tokens of its beginning."""
        self.hidden = self._split(hidden)
        end = self.hidden.end.shape[1]
        # Rows of position ids (time, height, width) stand in front of the batch.
        rows = layout.positions if layout.positions.dim() == 3 else layout.positions[None]
        begin_positions = torch.stack([self._beginning(row) for row in rows]).reshape(
            *layout.positions.shape[:-2], len(self.begins), -1
        )
        begin_valid = self._beginning(layout.valid) if len(set(self.begins)) > 1 else None
        config = decoder.config
        self.begin_mask = create_causal_mask(
            config=config, inputs_embeds=self.hidden.begin, attention_mask=begin_valid, past_key_values=None
        )
        self.end_mask = create_causal_mask(
            config=config,
            inputs_embeds=self.hidden.end,
            attention_mask=layout.valid,
            past_key_values=Rows(self.width - end),  # type: ignore[arg-type]
        )
        end_positions = layout.positions[..., self.width - end :]
        self.begin_rope = decoder.rotary_emb(self.hidden.begin, position_ids=begin_positions)
        self.end_rope = decoder.rotary_emb(self.hidden.end, position_ids=end_positions)

    @classmethod
    def start(cls, session: Any, state: PromptState, layout: Layout, stream: Stream) -> SharedRun | None:
        """The first stretch of a prompt, from layer 0 on; None where nothing is shared."""
        sharing = session.sharing
        hidden = stream.hidden
        if sharing is None or not sharing.pays or stream.coming or not cls._alike(sharing, layout, hidden):
            return None
        # Where a stage has changed the visual tokens already, layers compute something of this method's own.
        common = layout is state.prompt and session.output is None and session.blocks is None
        return cls(session.decoder, sharing, layout, hidden, sharing.memory if common else None)

    def layer(self, index: int, session: Any, cache: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Run one decoder layer and put its keys and values into ``cache``, whole rows in batch order.

        Returns
        -------
        What entered it, whole rows if some stage is going to look at them, and what left it at the rows' own ends.
        """
        output = None if self.memory is None else self.memory.get(index)
        if output is None or not session.notes_at(index) <= output.notes.keys():
            output = self._compute(index, session, **kwargs)
            if self.memory is not None and index in self.sharing.remember:
                self.memory[index] = output
        self.entered, self.hidden = self.hidden, output.hidden
        for name in session.notes_at(index):
            getattr(session, name)[index] = self.whole(output.notes[name])
        cache.update(output.keys[:, :, :0], output.values[:, :, :0], index)
        # By reference: of the tokens here cache layers only ever replace rows, they write behind them.
        cache.layers[index].hold(output.keys, output.values, self.width)
        entered = self.whole(self.entered) if session.looks_at(index) else self.entered.end
        return entered, self.hidden.end

    def _compute(self, index: int, session: Any, **kwargs: Any) -> LayerOutput:
        layer = self.decoder.layers[index]
        first = _Collect()
        begin = layer(
            self.hidden.begin,
            attention_mask=self.begin_mask,
            position_embeddings=self.begin_rope,
            position_ids=None,
            past_key_values=first,
            **kwargs,
        )
        of_begin = session.take_notes(index)
        second = _Join(self, first)
        end = layer(
            self.hidden.end,
            attention_mask=self.end_mask,
            position_embeddings=self.end_rope,
            position_ids=None,
            past_key_values=second,
            **kwargs,
        )
        of_end = session.take_notes(index)
        notes = {name: Parts(of_begin[name], of_end[name]) for name in of_end}
        return LayerOutput(Parts(begin, end), second.keys, second.values, notes)

    def _beginning(self, values: Tensor) -> Tensor:
        """[B, n, ...] -> [G, P, ...]: the groups' beginnings, padded on the left."""
        longest = max(self.begins)
        rows = []
        for row, length in zip(self.sharing.firsts, self.begins, strict=True):
            stop = self.width - self.ends[row]
            own = values[row, stop - length : stop]
            pad = longest - length
            rows.append(torch.cat([own.new_zeros(pad, *own.shape[1:]), own]) if pad else own)
        return torch.stack(rows)

    def _split(self, hidden: Tensor) -> Parts:
        return Parts(self._beginning(hidden), hidden[:, self.width - max(self.ends) :])

    def whole(self, parts: Parts, dim: int = 1, room: int | None = None) -> Tensor:
        """Rows in batch order, [G, P, ...] and [B, S, ...] -> [B, n, ...] with tokens along ``dim``.

        With ``room``, so many places along ``dim``; those from n on are left as they are.
        """
        begin, end = parts.begin.movedim(dim, 1), parts.end.movedim(dim, 1)
        shape = list(parts.end.shape)
        shape[dim] = room or self.width
        out = parts.end.new_empty(shape)
        rows = out.movedim(dim, 1)
        longest, most = begin.shape[1], end.shape[1]
        numbered = enumerate(zip(self.sharing.groups, self.ends, strict=True))
        for (group, own), run in itertools.groupby(numbered, key=lambda row: row[1]):
            first, *more = (number for number, _ in run)
            same = slice(first, first + len(more) + 1)  # one copy for neighbours of one group and length
            length = self.begins[group]
            start = self.width - own - length
            rows[same, start : start + length] = begin[group, longest - length :]
            rows[same, self.width - own : self.width] = end[same, most - own :]
            rows[same, :start] = 0
        return out

    def followed_by(self, layout: Layout, hidden: Tensor) -> SharedRun | None:
        """The stretch after a reduction; None if rows of a group no longer begin alike."""
        alike = self._alike(self.sharing, layout, hidden)
        return SharedRun(self.decoder, self.sharing, layout, hidden, None) if alike else None

    @staticmethod
    def _alike(sharing: Sharing, layout: Layout, hidden: Tensor) -> bool:
        width, ends, firsts = hidden.shape[1], sharing.ends, sharing.firsts
        for row, group in enumerate(sharing.groups):
            first = firsts[group]
            if first == row:
                continue
            length = layout.lengths[row] - ends[row]
            if length != layout.lengths[first] - ends[first]:
                return False
            own, other = width - ends[row], width - ends[first]
            if not torch.equal(hidden[row, own - length : own], hidden[first, other - length : other]):
                return False
        return True


class _Collect:
    """Stands in for a KV cache: notes a layer's keys and values."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        return keys, values


class _Join:
    """Stands in for a KV cache that holds the beginnings already: notes keys and values of whole rows, with room."""

    keys: Tensor
    values: Tensor

    def __init__(self, run: SharedRun, begin: _Collect) -> None:
        self.run, self.begin = run, begin

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        width = self.run.width
        self.keys = self.run.whole(Parts(self.begin.keys, keys), 2, with_spare(width))
        self.values = self.run.whole(Parts(self.begin.values, values), 2, with_spare(width))
        return self.keys[:, :, :width], self.values[:, :, :width]
