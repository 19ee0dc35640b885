"""The decoder loop: stock layers, with visual tokens really leaving between them and KV caches of their own lengths."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from corematching.engine import turns
from corematching.engine.cache import Conversation, Rows, trace_layers
from corematching.engine.layout import Layout, Past, Stream, deepstack_rows, joined
from corematching.engine.positions import Positions
from corematching.engine.rows import note_prompt, open_choices
from corematching.engine.sharing import SharedRun
from corematching.engine.state import PromptState
from corematching.engine.views import AttentionSignals, FFNSignals, KVSignals, LayerSignals, Prompt
from corematching.errors import UserError
from corematching.methods.base import BeforeLayer, Keep, KeepKV, ZeroKV
from corematching.methods.selection import tokens_at

if TYPE_CHECKING:
    from corematching.engine.session import Session


def forward(
    session: Session,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = None,
    visual_pos_masks: Tensor | None = None,
    deepstack_visual_embeds: list[Tensor] | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """Stands in for the text decoder's ``forward`` while a method is installed.

    The tokens are a turn's prompt, decoded tokens, or one after the other (a prompt with the first candidates of
    speculative decoding, or with what was generated so far when there is no KV cache).
    """
    decoder = session.decoder
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2):
        raise UserError(
            "attention_mask must be a 2D padding mask while a method is installed (static caches make others: use the "
            "default, dynamic cache)"
        )
    if use_cache is None:
        use_cache = decoder.config.use_cache
    cache = past_key_values
    if cache is None and use_cache:
        cache = DynamicCache(config=decoder.config)
    talk = session.conversation(cache)
    length = inputs_embeds.shape[1]
    prompt = session.prompt_tokens(length, talk, cache)
    kept = cache
    if cache is None and prompt < length:
        cache = DynamicCache(config=decoder.config)  # of this pass only
    if position_ids is None:
        position_ids = torch.arange(length, device=inputs_embeds.device)[None] + (talk.seen if talk else 0)
    positions = Positions.of(position_ids, session.family.position_rows, len(inputs_embeds))
    parts = []
    if prompt:
        masked = attention_mask
        if masked is not None:
            masked = masked[:, : masked.shape[1] - length + prompt]
        added = () if deepstack_visual_embeds is None else deepstack_rows(visual_pos_masks, deepstack_visual_embeds)
        stream = Stream(inputs_embeds, added).of(lambda rows: rows[:, :prompt])
        hidden, talk = _prefill(session, talk, stream, masked, positions.cut(0, prompt), cache, use_cache, kwargs)
        parts.append(hidden)
    if prompt < length:
        assert talk is not None
        own = positions.cut(prompt, length)
        parts.append(_decode(session, talk, inputs_embeds[:, prompt:], own, cache, kwargs))
    session.finish_pass(talk, kept)
    hidden = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return BaseModelOutputWithPast(last_hidden_state=decoder.norm(hidden), past_key_values=kept)


# -------------------------------------------------------------------------------------------------------------- prefill
def _prefill(session, talk, stream: Stream, attention_mask, positions, cache, use_cache, kwargs) -> tuple:
    """Run a turn's prompt: hidden states, and the conversation (None without a cache)."""
    decoder, length = session.decoder, stream.hidden.shape[1]
    past = turns.pasts(talk, cache, attention_mask, decoder.config.num_hidden_layers)
    own = attention_mask if attention_mask is None else attention_mask[:, -length:]
    order = turns.padding_first(own) if session.acts else None
    if order is not None and own is not None:
        stream = stream.of(partial(tokens_at, index=order))
        own, positions = own.gather(1, order), positions.along(order)
    state, prompt = turns.open_turn(session, stream.hidden, own, positions.rotary, talk, past, order)
    open_choices(session, state)
    if cache is not None:
        if talk is None:
            talk = session.follow(Conversation(session))
            trace_layers(cache, talk, decoder.config.num_hidden_layers)
        talk.state = state
        session.undecided.pop(talk, None)
    layout, previous = state.prompt, None
    context: tuple = ()
    known: tuple = ()
    stream, layout = session.vision_tokens(state, prompt, stream, layout, cached=cache is not None)
    shared = SharedRun.start(session, state, layout, stream) if cache is not None and past[0].rows == 0 else None
    captured = None
    if session.capturing and cache is not None and len(stream.hidden) == 1 and past[0].rows == 0:
        alone = _causal_mask(decoder.config, stream.hidden, own, 0, positions.text) is None
        captured = session.captured_prefill(length) if alone else None
    for run in captured.runs if captured else _one_by_one(decoder.config.num_hidden_layers):
        if shared and session.before[run.start]:
            stream = Stream(shared.whole(shared.hidden))
        entering = layout
        for stage in session.before[run.start]:
            stream, layout = _reduce(session, stage, state, prompt, stream, layout, previous, cache)
        if shared and layout is not entering:
            shared = shared.followed_by(layout, stream.hidden)
        for _ in run:
            state.enter(layout)
        if shared:
            entered, hidden = shared.layer(run.start, session, cache, use_cache=use_cache, **kwargs)
            stream = Stream(hidden)
            previous = _signals(session, run.start, entered, layout, state, cache)
            _after_layer(session, run.start, state, prompt, previous, cache, talk)
            continue
        now = (id(layout), *map(id, (past[run.start].shift, state.kv_valid[run.start])), past[run.start].rows)
        if now != known:
            context, known = _context(decoder, stream.hidden, layout, run.start, state, own, positions, cache), now
        mask, numbers, rope = context
        if captured:
            entered, hidden = captured(run, stream.hidden, rope, cache)
        else:
            entered, hidden = run_layers(
                decoder, run, stream.hidden, mask, rope, numbers, cache, use_cache=use_cache, **kwargs
            )
        stream = stream.after_layer(hidden)
        previous = _signals(session, run[-1], entered, layout, state, cache)
        for index in run:
            _after_layer(session, index, state, prompt, previous, cache, talk)
    if talk is not None:
        talk.seen += length
        talk.prefilled = talk.seen
        talk.reduced = talk.reduced or any(rows != talk.seen for rows in state.kv_rows)
        talk.reduced = talk.reduced or any(shift is not None for shift in state.shifts)
    hidden = stream.hidden
    if order is not None and layout is state.prompt:  # every token back to where it was given
        hidden = torch.empty_like(hidden).scatter(1, order[..., None].expand_as(hidden), hidden)
    session.finish_prefill(state, layout)
    return hidden, talk


def _context(decoder, hidden, layout, layer, state, own, positions: Positions, cache) -> tuple:
    """Mask, position ids for the attention kernel and rotary embedding of a layer's prefill."""
    past = state.past[layer]
    if layout is state.prompt and past.rows == 0:
        mask = _causal_mask(decoder.config, hidden, own, 0 if cache is not None else None, positions.text)
        return mask, positions.text, decoder.rotary_emb(hidden, position_ids=positions.rotary)
    mask = _causal_mask(decoder.config, hidden, state.kv_valid[layer], past.rows)
    rotary = layout.positions if past.shift is None else layout.positions - past.shift
    return mask, Positions.text_of(rotary), decoder.rotary_emb(hidden, position_ids=rotary)


def _causal_mask(config: Any, hidden: Tensor, valid: Tensor | None, rows: int | None, positions: Any = None) -> Any:
    """The causal mask of some tokens behind so many KV rows, in the form the attention implementation wants."""
    return create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=valid,
        past_key_values=None if rows is None else Rows(rows),  # type: ignore[arg-type]
        position_ids=positions,
    )


def run_layers(
    decoder: Any, layers: range, hidden: Tensor, mask: Any, rope: Any, positions: Any, cache: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Run stock layers over hidden states: what entered the last one, and what left it."""
    entered = hidden
    for index in layers:
        entered = hidden
        hidden = decoder.layers[index](
            hidden,
            attention_mask=mask,
            position_embeddings=rope,
            position_ids=positions,
            past_key_values=cache,
            **kwargs,
        )
    return entered, hidden


def _one_by_one(depth: int) -> list[range]:
    return [range(index, index + 1) for index in range(depth)]


def _signals(session, layer: int, hidden: Tensor, layout: Layout, state: PromptState, cache: Any) -> AttentionSignals:
    """What a layer's attention can be asked about, from what enters it."""
    past, past_keys = state.past[layer], None
    if past.rows:
        past_keys = cache.layers[layer].keys[:, :, : past.rows]
    decoder = session.decoder
    return AttentionSignals(
        decoder.layers[layer], hidden, layout, decoder.rotary_emb, state.ledger, past=past, past_keys=past_keys
    )


def _reduce(
    session: Session,
    stage: BeforeLayer,
    state: PromptState,
    prompt: Prompt,
    stream: Stream,
    layout: Layout,
    previous: AttentionSignals | None,
    cache: Any,
) -> tuple[Stream, Layout]:
    """Ask one stage for its decision and carry it out."""
    if max(layout.visual_counts) == 0:
        return stream, layout
    hidden = stream.hidden
    attention = {stage.layer: _signals(session, stage.layer, hidden, layout, state, cache)}
    if previous is not None:
        # Right after its layer ran, the cache holds exactly the keys that layer computed.
        previous.cached_keys = cached_keys(cache, stage.layer - 1, previous)
        attention[stage.layer - 1] = previous
    view = LayerSignals(
        stage.layer,
        prompt,
        hidden,
        layout,
        state.ledger,
        attention,
        session.activations.get(stage.layer - 1),
        session.attended.get(stage.layer - 1),
        session.decoder.norm,
    )
    with state.ledger.charging([count > 0 for count in layout.visual_counts]):
        decision = stage.select(view)
    if decision is None or (isinstance(decision, Keep) and layout.keeps_everything(decision)):
        return stream, layout
    if isinstance(decision, Keep):
        layout, stream = layout.drop(decision, stream, stage.renumber)
    else:
        layout, stream = layout.replace(decision, stream, stage.renumber)
    return stream, layout


def cached_keys(cache: Any, layer: int, signals: AttentionSignals) -> Tensor | None:
    """The layer's keys [B, H_kv, n, hd] of this turn if the cache still holds the whole sequence."""
    if cache is None or len(cache.layers) <= layer:
        return None
    keys, rows = cache.layers[layer].keys, signals.past.rows
    return keys[:, :, rows:] if keys.shape[-2] == rows + signals.layout.valid.shape[1] else None


def _after_layer(session, index: int, state: PromptState, prompt: Prompt, signals, cache, talk) -> None:
    """Carry out the KV and FFN stages of a layer whose prefill is done."""
    activations = session.activations.get(index)
    layout = signals.layout
    for stage in session.choose[index] if cache is not None else ():
        assert activations is not None
        mlp = session.decoder.layers[index].mlp
        session.defer_choice(talk, stage, FFNSignals(index, activations, layout, prompt, mlp, state.ledger))
    if session.after[index] and cache is not None:
        layer_cache = cache.layers[index]
        rows = signals.past.rows
        signals.cached_keys = layer_cache.keys[:, :, rows:]
        for stage in session.after[index]:
            view = KVSignals(
                index,
                layer_cache.keys[:, :, rows:],
                layer_cache.values[:, :, rows:],
                layout,
                prompt,
                state.ledger,
                signals,
                activations,
            )
            _shrink_kv(stage.select(view), state, index, layer_cache, index in session.measured)
    if state.rows is not None and cache is not None:
        note_prompt(session, index, state, cache.layers[index], signals, prompt)
    session.activations.pop(index - 1, None)
    session.attended.pop(index - 1, None)


def _shrink_kv(
    decision: KeepKV | ZeroKV | None, state: PromptState, index: int, layer_cache: Any, measured: bool
) -> None:
    """Carry out a decision about the rows of this turn; earlier ones stay."""
    past = state.past[index]
    before, keys = layer_cache.keys.tensor_split([past.rows], 2)
    values_before, values = layer_cache.values.tensor_split([past.rows], 2)
    if isinstance(decision, ZeroKV):
        gone = decision.mask[:, None, :, None]
        keys, values = keys.masked_fill(gone, 0), values.masked_fill(gone, 0)
        gone_now = decision.mask.sum(1).tolist()
        state.zeroed_kv = [before + now for before, now in zip(state.zeroed_kv, gone_now, strict=True)]
    elif isinstance(decision, KeepKV):
        if measured and state.rows is not None:
            state.rows.note_dropped(index, keys, decision, state.kv_lengths[index])
        gather = decision.index[..., None].expand(-1, -1, -1, keys.shape[-1])
        keys, values = keys.gather(2, gather), values.gather(2, gather)
        batch, width = decision.index.shape[0], decision.index.shape[2]
        valid, counts = decision.valid, decision.counts
        if valid is not None and valid.dim() == 3:
            assert state.rows is not None
            counts, valid = state.rows.note_heads(index, valid), None
        state.kv_valid[index] = joined(past, valid, width)
        state.kv_rows[index] = past.rows + width
        if counts is None:
            counts = [width] * batch if valid is None else valid.sum(1).tolist()
        state.kv_lengths[index] = [old + new for old, new in zip(past.lengths or [0] * batch, counts, strict=True)]
    else:
        return
    layer_cache.keys = torch.cat([before, keys], 2) if past.rows else keys
    layer_cache.values = torch.cat([values_before, values], 2) if past.rows else values


# --------------------------------------------------------------------------------------------------------------- decode
def _decode(session, talk: Conversation, hidden: Tensor, given: Positions, cache: Any, kwargs: dict) -> Tensor:
    """Run decoded tokens behind whatever rows each layer holds."""
    decoder, state = session.decoder, talk.state
    length = hidden.shape[1]
    assert state is not None
    session.choose_neurons(talk)
    if state.rows is not None:
        if length > 1:
            raise UserError(f"method {session.name!r} decodes one token at a time: it chooses KV rows for each")
        state.rows.open_step()
    contexts: dict[tuple, tuple] = {}
    session.active, session.decoding_cache = state, cache
    try:
        for index, layer in enumerate(decoder.layers[: decoder.config.num_hidden_layers]):
            rows, valid, shift = cache.layers[index].rows, state.kv_valid[index], state.shifts[index]
            key = (id(valid), rows, id(shift))
            if key not in contexts:
                if valid is not None:
                    valid = joined(Past(rows, valid[:, :rows]), None, rows + length - min(rows, valid.shape[1]))
                mask = _causal_mask(decoder.config, hidden, valid, rows)
                own = given if shift is None else given.minus(shift)
                contexts[key] = mask, own.text, decoder.rotary_emb(hidden, position_ids=own.rotary)
            mask, positions, rope = contexts[key]
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rope,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **kwargs,
            )
    finally:
        session.active = session.decoding_cache = None
    session.trace_continuation(state)
    state.decode(length, talk.decoded)
    talk.seen += length
    session.current = state
    return hidden
