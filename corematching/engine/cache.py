"""KV caches that may hold fewer rows than tokens went in, and what lives as long as they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from corematching.errors import UserError

if TYPE_CHECKING:
    from corematching.engine.session import Session
    from corematching.engine.state import PromptState


SPARE, LEAST_SPARE = 8, 64
"""Spare room of roomy layers: this part of the rows, but at least so many."""


@dataclass(eq=False)
class Conversation:
    """The turns that share one KV cache under one installed method."""

    session: Session
    state: PromptState | None = None
    """The latest turn."""
    seen: int = 0
    """Tokens that went in, padding included: what stock code takes for the cache's length."""
    prefilled: int = 0
    """How many of them the latest turn's prefill had seen."""
    reduced: bool = False
    """Whether some layer holds other rows than those of all tokens at their own positions."""
    open: bool = True
    """Whether the method is still installed."""

    @property
    def decoded(self) -> int:
        """Tokens decoded since the latest prefill."""
        return max(0, self.seen - self.prefilled)

    def crop(self, tokens: int) -> None:
        """The last ``tokens`` tokens leave.

        Raises
        ------
        UserError
            If they reach back into a prefill that the method shortened: its rows stand for other tokens.
        """
        if self.reduced and tokens > self.decoded:
            raise UserError(
                f"cannot crop {tokens} tokens from this KV cache: only the {self.decoded} after the prefill that the "
                "method shortened can go"
            )
        if self.state is not None and self.state.rows is not None and self.decoded:
            raise UserError(
                "cannot crop this KV cache: the rows that its method reads were chosen with the last tokens"
            )
        if self.state is not None:
            self.state.discarded_tokens += min(tokens, self.decoded)
        self.seen -= tokens

    def take(self, rows: Tensor) -> None:
        """The batch is now made of these rows (long) of what it was."""
        if self.state is not None:
            self.state.take(rows)

    def __deepcopy__(self, memo: dict) -> Conversation:
        """A copied cache goes its own way from here; weights and what the first turns booked are shared."""
        state = None if self.state is None else self.state.fork()
        twin = Conversation(self.session, state, self.seen, self.prefilled, self.reduced, self.open)
        if self.open:
            self.session.follow(twin, like=self)
        return twin


class TracedLayer(DynamicLayer):
    """One layer of a cache filled under a method: reports the tokens that went in, holds the rows that stayed."""

    def __init__(self, talk: Conversation, first: bool, roomy: bool = False) -> None:
        super().__init__()
        self.talk = talk
        self.roomy = roomy
        """Whether decoded rows are written into spare room behind the others: appending copies all rows otherwise."""
        self._room: tuple[Tensor, Tensor, Tensor] | None = None
        """Keys and values with spare room, and the view of the keys that the layer showed last."""
        self.first = first
        """Whether this is the cache's first layer, which passes on what happens to the whole cache."""

    @property
    def rows(self) -> int:
        """Rows held."""
        return super().get_seq_length()

    @property
    def _tracked(self) -> bool:
        return self.talk.open or self.talk.reduced

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.talk.reduced and not self.talk.open:
            name = self.talk.session.method.name or type(self.talk.session.method).__name__
            raise UserError(f"this KV cache was shortened by method {name!r}: continue it inside the method's context")
        if self.roomy and self.rows and key_states.shape[-2] == 1:
            return self._append(key_states, value_states)
        return super().update(key_states, value_states, *args, **kwargs)

    def hold(self, keys: Tensor, values: Tensor, rows: int) -> None:
        """Take over the first ``rows`` rows of tensors with room for more, and write decoded ones behind them.

        Others may hold the same rows: what stands behind them belongs to whoever decodes now.
        """
        self.keys, self.values = keys[:, :, :rows], values[:, :, :rows]
        self._room, self.roomy = (keys, values, self.keys), True

    def _append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.rows
        if self._room is None or self._room[2] is not self.keys or rows == self._room[0].shape[2]:
            with torch.inference_mode(False), torch.no_grad():
                room = with_spare(rows)
                keys, values = (part.new_empty(*part.shape[:2], room, part.shape[3]) for part in (key, value))
                keys[:, :, :rows].copy_(self.keys)  # type: ignore[arg-type]
                values[:, :, :rows].copy_(self.values)  # type: ignore[arg-type]
        else:
            keys, values, _ = self._room
        keys[:, :, rows : rows + 1].copy_(key)
        values[:, :, rows : rows + 1].copy_(value)
        self.keys, self.values = keys[:, :, : rows + 1], values[:, :, : rows + 1]
        self._room = keys, values, self.keys
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.talk.seen if self._tracked else self.rows

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.rows + query_length, self.get_seq_length() - self.rows

    def reset(self) -> None:
        super().reset()
        self.talk.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        if self.first and tokens_to_remove < 0 and self._tracked:
            self.talk.crop(-tokens_to_remove)
        super().crop(tokens_to_remove)

    def keep_rows(self, rows: int) -> None:
        """Forget all rows after the first ``rows``."""
        if self.rows > rows and self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[..., :rows, :], self.values[..., :rows, :]

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._passed_on(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._passed_on(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        before = self.keys
        super().batch_repeat_interleave(repeats)
        if self.rows and before is not None:
            self._passed_on(torch.arange(before.shape[0], device=before.device).repeat_interleave(repeats))

    def _passed_on(self, rows: Tensor) -> None:
        if self.first:
            self.talk.take(rows)


def with_spare(rows: int) -> int:
    """Room that a roomy layer takes for so many rows."""
    return rows + max(rows // SPARE, LEAST_SPARE)


class Rows:
    """Stands in for a cache where masks are made: so many rows before the new ones, whatever tokens they hold."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where the new rows begin."""
        return self.rows

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The same, as older versions of transformers ask for it."""
        return self.rows

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Rows that are attended to, and the first one's number."""
        return self.rows + query_length, 0


def check_cache(cache: Any) -> None:
    """Refuse caches whose rows cannot be shortened layer by layer.

    Raises
    ------
    UserError
        For anything but a dynamic cache of full-attention layers on the model's own device.
    """
    layers = getattr(cache, "layers", None) if isinstance(cache, Cache) else None
    if layers is None:
        raise UserError(f"past_key_values of type {type(cache).__name__} is not supported: give a DynamicCache")
    kinds = {type(layer) for layer in layers} or {cache.layer_class_to_replicate}
    if getattr(cache, "offloading", False) or not kinds <= {DynamicLayer, TracedLayer}:
        names = ", ".join(sorted(str(getattr(kind, "__name__", kind)) for kind in kinds))
        offloaded = "offloaded " if getattr(cache, "offloading", False) else ""
        raise UserError(
            f"a {offloaded}{type(cache).__name__} of {names} is not supported while a method is installed: use the "
            "default (dynamic) cache"
        )


def conversation_of(cache: Any) -> Conversation | None:
    """What a filled cache belongs to; None for an empty one, or one filled without a method."""
    layers = cache.layers if cache is not None else ()
    talk = getattr(layers[0], "talk", None) if layers else None
    return talk if talk is not None and talk.seen > 0 else None


def trace_layers(cache: Any, talk: Conversation, depth: int) -> None:
    """Make an empty cache's layers report to a conversation."""
    roomy = talk.session.choose_rows.keys() | talk.session.ragged
    cache.layers = [TracedLayer(talk, index == 0, index in roomy) for index in range(depth)]


@dataclass
class Before:
    """A cache as it was before a call, to go back to if the call fails."""

    cache: Any
    layers: list[Any]
    rows: list[int]
    talk: Conversation | None
    kept: tuple[Any, int, int, bool] | None
    counters: Any

    @classmethod
    def of(cls, cache: Any) -> Before:
        """Notes numbers and references only: no rows are copied or held."""
        talk = conversation_of(cache)
        layers = list(cache.layers) if cache is not None else []
        rows = [layer.rows for layer in layers] if talk is not None else []
        kept = (talk.state, talk.seen, talk.prefilled, talk.reduced) if talk is not None else None
        counters = talk.state.counters if talk is not None and talk.state is not None else None
        return cls(cache, layers, rows, talk, kept, counters)

    def restore(self) -> None:
        """Take back what was appended since: new rows always stand behind the old ones."""
        if self.cache is None:
            return
        if self.talk is None:
            self.cache.layers = self.layers if all(_is_empty(layer) for layer in self.layers) else []
            return
        for layer, rows in zip(self.layers, self.rows, strict=True):
            layer.keep_rows(rows)
        assert self.kept is not None
        self.talk.state, self.talk.seen, self.talk.prefilled, self.talk.reduced = self.kept
        if self.talk.state is not None and self.counters is not None:
            self.talk.state.counters = self.counters


def _is_empty(layer: Any) -> bool:
    return not layer.is_initialized
