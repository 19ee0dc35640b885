"""Greedy decoding on static shapes: KV buffers sized after pruning, and on a GPU one captured graph per step.

Launching a decode step's few hundred kernels one by one takes longer than a pruned step's memory traffic, so on a GPU
the step is captured as a CUDA graph. Prompts whose buffers have the same sizes share a graph. On a CPU there is nothing
to capture, but static buffers still save the copy of the whole KV cache that appending makes in every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from corematching.engine.cache import conversation_of
from corematching.engine.captured import WARM_UPS
from corematching.engine.ffn import SlicedFFN
from corematching.errors import UserError
from corematching.models.families import family_of

if TYPE_CHECKING:
    from corematching.engine.session import Session
    from corematching.engine.state import PromptState

ENGINES = ("eager", "compiled")
BLOCK = 64
"""KV buffers are rounded up to a multiple of this, so that prompts of similar length share a captured graph."""
MOST_DECODERS = 8
"""Static decoders kept per installed method; of more prompt shapes, the least recently used go."""


def prefill(model: Any, inputs: dict[str, Tensor], engine: str = "eager") -> tuple[DynamicCache, Tensor]:
    """Run a prompt: its KV cache and the first answer token, long [B, 1].

    With engine "compiled", on a GPU and inside a method's context, layers run as CUDA graphs where they can
    (:class:`corematching.engine.captured.CapturedPrefill`).
    """
    session: Session | None = getattr(model, "_corematching", None)
    mask = inputs.get("attention_mask")
    plain = family_of(model.config).position_rows == 1
    if plain and mask is not None and not bool(mask.all()) and "position_ids" not in inputs:
        # As generate() numbers left-padded prompts: padding takes no positions.
        inputs = {**inputs, "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}
    if session is not None:
        session.capturing = engine == "compiled"
    try:
        out = model(**inputs, use_cache=True, logits_to_keep=1)
    finally:
        if session is not None:
            session.capturing = False
    return out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)


def decoder_of(
    model: Any, inputs: dict[str, Tensor], cache: DynamicCache, token: Tensor, room: int, engine: str
) -> EagerDecoder | StaticDecoder:
    """The decoder that continues a prefilled prompt.

    Parameters
    ----------
    room
        Most decode steps.
    engine
        "eager" (works with or without a method) or "compiled" (needs one; use ``dense`` for none).

    Raises
    ------
    UserError
        For an unknown engine, or "compiled" without a method or with an attention kernel that takes no masks.
    """
    if engine not in ENGINES:
        raise UserError(f"engine={engine!r} is not valid: choose from {', '.join(ENGINES)}")
    if engine == "eager":
        return EagerDecoder(model, inputs, cache, token)
    session: Session | None = getattr(model, "_corematching", None)
    if session is None:
        raise UserError("engine='compiled' runs inside a method's context: use method dense for none")
    kernel = session.decoder.config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        raise UserError(f"engine='compiled' does not support attention kernel {kernel!r}: choose from sdpa, eager")
    if session.chooses_rows:
        raise UserError(f"engine='compiled' does not support method {session.name!r}, which chooses KV rows: use eager")
    talk = conversation_of(cache)
    if talk is None or talk.state is None:
        raise UserError("engine='compiled' continues prompts that prefill() ran in the same method's context")
    session.choose_neurons(talk)
    state = talk.state
    room = max(room, WARM_UPS)  # capturing writes that many rows
    key = signature(state, cache, room)
    decoder = session.decoders.get(key)
    if decoder is None:
        decoder = session.decoders[key] = StaticDecoder(model, session, state, cache, room)
        if len(session.decoders) > MOST_DECODERS:
            session.decoders.popitem(last=False)
    session.decoders.move_to_end(key)
    decoder.load(state, cache, token)
    return decoder


def generate(
    model: Any,
    inputs: dict[str, Tensor],
    max_new_tokens: int,
    engine: str = "eager",
    eos_token_id: int | None = None,
) -> Tensor:
    """Greedy answers, long [B, T]; T is ``max_new_tokens``, or less once every row has produced ``eos_token_id``.

    Raises
    ------
    UserError
        As :func:`decoder_of`.
    """
    with torch.inference_mode():
        cache, token = prefill(model, inputs, engine)
        tokens = [token]
        ended = torch.zeros_like(token, dtype=torch.bool) if eos_token_id is None else token == eos_token_id
        if max_new_tokens > 1:
            decoder = decoder_of(model, inputs, cache, token, max_new_tokens - 1, engine)
            del cache  # a static decoder has its own copy
            for _ in range(max_new_tokens - 1):
                if eos_token_id is not None and bool(ended.all()):
                    break
                tokens.append(decoder.step().clone())
                ended = ended | (tokens[-1] == eos_token_id)
        return torch.cat(tokens, dim=1)


class EagerDecoder:
    """One stock forward pass per token, growing the dynamic cache."""

    def __init__(self, model: Any, inputs: dict[str, Tensor], cache: DynamicCache, token: Tensor) -> None:
        self.model, self.cache, self.token = model, cache, token
        mask = inputs.get("attention_mask")
        self.mask = mask if mask is not None and not bool(mask.all()) else None

    def step(self) -> Tensor:
        """The next token, long [B, 1]."""
        arguments: dict[str, Tensor] = {}
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
            arguments = {"attention_mask": self.mask, "position_ids": self._positions(self.mask)}
        out = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True, **arguments)
        self.token = out.logits[:, -1].argmax(-1, keepdim=True)
        return self.token

    def _positions(self, mask: Tensor) -> Tensor:
        """Position id of the token that comes, [B, 1], or [1, B, 1] where images take fewer positions than tokens."""
        after = mask.sum(1, keepdim=True) - 1
        base: Any = family_of(self.model.config).base(self.model)
        deltas = getattr(base, "rope_deltas", None)
        return after if deltas is None else (after + deltas)[None]


class StaticKV:
    """Stands in for a transformers cache during a static step: writes one row per layer into fixed buffers."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], slots: list[Tensor]) -> None:
        self.keys, self.values, self.slots = keys, values, slots

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, H_kv, 1, hd] keys and values at the layer's slot; returns its whole buffers."""
        self.keys[layer].index_copy_(2, self.slots[layer], key)
        self.values[layer].index_copy_(2, self.slots[layer], value)
        return self.keys[layer], self.values[layer]


class StaticDecoder:
    """The decode step of an installed method on fixed buffers, for one prompt (or batch) at a time.

    Parameters
    ----------
    model, session
        The model and the method's session on it.
    state, cache
        A prefilled prompt; its shapes set the buffers' sizes. Call :meth:`load` before the first step.
    room
        Most decode steps.
    """

    def __init__(self, model: Any, session: Session, state: PromptState, cache: DynamicCache, room: int) -> None:
        self.session, self.state = session, state
        self.decoder = session.decoder
        self.embed = model.get_input_embeddings()
        self.head = session.family.head(model)
        self.groups = _groups(state, cache)
        with torch.inference_mode(False):
            keys, values = ([_buffer(part, room) for part in parts] for parts in _parts(cache, len(state.layouts)))
            device, batch = keys[0].device, keys[0].shape[0]
            self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
            self.positions = torch.zeros_like(state.prompt.positions[..., -1:])
            self.shifts = [torch.zeros_like(self.positions) for _ in self.groups]
            self.slots = [torch.zeros(1, dtype=torch.long, device=device) for _ in self.groups]
            self.masks = [keys[group[0]].new_zeros(batch, 1, 1, keys[group[0]].shape[2]) for group in self.groups]
        self.group_of = [number for _, number in sorted((i, n) for n, group in enumerate(self.groups) for i in group)]
        self.kv = StaticKV(keys, values, [self.slots[number] for number in self.group_of])
        self.room = room
        self.left = 0
        self._replay: Callable[[], Any] | None = None
        self._ffns: dict[int, SlicedFFN] = {}
        """What the captured step computes with, by layer."""

    def load(self, state: PromptState, cache: DynamicCache, token: Tensor) -> None:
        """Take over a prefilled prompt of the same signature; captures the step the first time, on a GPU."""
        self.state = state
        self._fill(state, cache, token)
        for ffn in state.ffn.values():
            ffn.most_steps = self.room
        if self._can_replay():
            for layer, ffn in self._ffns.items():
                ffn.index.copy_(state.ffn[layer].index)  # type: ignore[union-attr]
        elif self._can_capture():
            counted = state.head_positions
            self._ffns = dict(state.ffn)  # type: ignore[arg-type]
            with torch.inference_mode(False):
                for ffn in self._ffns.values():
                    ffn.index = ffn.index.clone()  # later prompts' neurons go there; the trace keeps this prompt's
            self._replay, _ = self.session.capture(self._advance)  # type: ignore[misc]
            state.head_positions = counted
            self._fill(state, cache, token)
        else:
            self._replay = None

    @property
    def captured(self) -> bool:
        """Whether steps replay a captured one."""
        return self._replay is not None

    def step(self) -> Tensor:
        """The next token, long [B, 1]; overwritten by the next step."""
        if self.left == 0:
            raise RuntimeError(f"the KV buffers were made for {self.room} steps and are full")
        self.left -= 1
        self.state.decode(1, self.state.decode_steps)
        if self._replay is None:
            self._advance()
        else:
            for ffn in self.state.ffn.values():
                ffn.check_rows()
            self._replay()
            self.state.count_head(1)  # counted by a hook where Python runs
        return self.token

    def _fill(self, state: PromptState, cache: DynamicCache, token: Tensor) -> None:
        keys, values = _parts(cache, len(state.layouts))
        for buffers, parts in ((self.kv.keys, keys), (self.kv.values, values)):
            for buffer, part in zip(buffers, parts, strict=True):
                buffer[:, :, : part.shape[2]].copy_(part)
        for number, group in enumerate(self.groups):
            layer = group[0]
            length, valid, shift = keys[layer].shape[2], state.kv_valid[layer], state.shifts[layer]
            mask = self.masks[number]
            mask.fill_(torch.finfo(mask.dtype).min)
            seen = mask[:, 0, 0, :length]
            seen.zero_() if valid is None else seen.masked_fill_(valid, 0)
            self.slots[number].fill_(length)
            self.shifts[number].zero_() if shift is None else self.shifts[number].copy_(shift)
        self.positions.copy_(state.prompt.positions[..., -1:] + 1)
        self.token.copy_(token)
        self.left = self.room

    def _advance(self) -> None:
        """One decode step, in place: token in, next token out."""
        self.session.active = self.session.current = self.state
        try:
            hidden = self.embed(self.token)
            ropes = []
            for slot, mask, shift in zip(self.slots, self.masks, self.shifts, strict=True):
                mask.index_fill_(3, slot, 0)
                ropes.append(self.decoder.rotary_emb(hidden, position_ids=self.positions - shift))
            for layer, group in zip(self.decoder.layers, self.group_of, strict=False):
                hidden = layer(
                    hidden,
                    attention_mask=self.masks[group],
                    position_embeddings=ropes[group],
                    position_ids=None,
                    past_key_values=self.kv,
                    use_cache=True,
                )
            self.token.copy_(self.head(self.decoder.norm(hidden))[:, -1].argmax(-1, keepdim=True))
        finally:
            self.session.active = None
        self.positions.add_(1)
        for slot in self.slots:
            slot.add_(1)

    def _can_replay(self) -> bool:
        # Rows gathered elsewhere than in the captured ones are out of the graph's reach.
        return self._replay is not None and all(
            self.state.ffn[layer].rows is ffn.rows  # type: ignore[union-attr]
            for layer, ffn in self._ffns.items()
        )

    def _can_capture(self) -> bool:
        """Whether replaying does all that a step must do: nothing chosen, gathered or booked by Python on the way."""
        return (
            self.session.capture is not None
            and self.token.shape[0] == 1
            and not self.session.tokenwise
            and all(ffn.capturable for ffn in self.state.ffn.values())
        )


def signature(state: PromptState, cache: DynamicCache, room: int) -> tuple:
    """What two prompts must share to run on the same static decoder."""
    keys, _ = _parts(cache, len(state.layouts))
    ffn = tuple((layer, tuple(chosen.shape)) for layer, chosen in sorted(state.neurons.items()))
    lengths = tuple((tuple(key.shape[:2]), _rounded(key.shape[2] + room)) for key in keys)
    return room, lengths, ffn, tuple(tuple(group) for group in _groups(state, cache))


def _groups(state: PromptState, cache: DynamicCache) -> list[list[int]]:
    """Layers that share slot, mask and rotary embedding: same KV length, padding and position shift."""
    groups: dict[tuple, list[int]] = {}
    keys, _ = _parts(cache, len(state.layouts))
    for layer, key in enumerate(keys):
        valid = state.kv_valid[layer]
        alike = (key.shape[2], None if valid is None else id(valid), id(state.shifts[layer]))
        groups.setdefault(alike, []).append(layer)
    return list(groups.values())


def _parts(cache: DynamicCache, depth: int) -> tuple[list[Tensor], list[Tensor]]:
    layers: list[Any] = cache.layers[:depth]
    return [layer.keys for layer in layers], [layer.values for layer in layers]


def _buffer(part: Tensor, room: int) -> Tensor:
    batch, heads, length, width = part.shape
    return part.new_zeros(batch, heads, _rounded(length + room), width)


def _rounded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK
