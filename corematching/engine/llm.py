"""The decoder loop: stock layers, with visual tokens really leaving between them and KV caches of their own lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from corematching.engine.layout import Layout
from corematching.engine.state import PromptState
from corematching.engine.views import AttentionSignals, FFNSignals, KVSignals, LayerSignals, Prompt
from corematching.errors import UserError
from corematching.methods.base import BeforeLayer, Keep, KeepKV, ZeroKV

if TYPE_CHECKING:
    from corematching.engine.session import Session


def forward(
    session: Session,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """Stands in for the text decoder's ``forward`` while a method is installed."""
    decoder = session.decoder
    if attention_mask is not None and attention_mask.dim() != 2:
        raise UserError("static caches are not supported while a method is installed: use the default (dynamic) cache")
    if use_cache is None:
        use_cache = decoder.config.use_cache
    if use_cache and past_key_values is None:
        past_key_values = DynamicCache(config=decoder.config)
    state = session.states.get(past_key_values) if past_key_values is not None else None
    if state is None and past_key_values is not None and past_key_values.get_seq_length() > 0:
        raise UserError("a KV cache filled outside the method's context cannot be continued inside it")
    run = _prefill if state is None else _decode
    hidden = run(session, state, inputs_embeds, attention_mask, position_ids, past_key_values, use_cache, kwargs)
    return BaseModelOutputWithPast(last_hidden_state=decoder.norm(hidden), past_key_values=past_key_values)


def _prefill(session, state, hidden, attention_mask, position_ids, cache, use_cache, kwargs) -> Tensor:
    decoder = session.decoder
    if position_ids is None:
        position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
    mask = create_causal_mask(
        config=decoder.config,
        inputs_embeds=hidden,
        attention_mask=attention_mask,
        past_key_values=cache,
        position_ids=position_ids,
    )
    rope = decoder.rotary_emb(hidden, position_ids=position_ids)
    state, prompt = session.begin(hidden, attention_mask, position_ids, cache)
    layout, previous = state.prompt, None
    hidden, layout = session.vision_tokens(state, prompt, hidden, layout)
    alone = mask is None and len(hidden) == 1 and cache is not None
    captured = session.captured_prefill(hidden.shape[1]) if alone else None
    for run in captured.runs if captured else _one_by_one(decoder.config.num_hidden_layers):
        for stage in session.before[run.start]:
            hidden, layout = _reduce(session, stage, state, prompt, hidden, layout, previous, cache)
        if layout is not (state.layouts[-1] if state.layouts else state.prompt):
            mask = _reduced_mask(decoder.config, hidden, layout)
            position_ids = layout.positions
            rope = decoder.rotary_emb(hidden, position_ids=position_ids)
        for _ in run:
            state.enter(layout)
        if captured:
            entered, hidden = captured(run, hidden, rope, position_ids, cache)
        else:
            entered, hidden = run_layers(
                decoder, run, hidden, mask, rope, position_ids, cache, use_cache=use_cache, **kwargs
            )
        previous = AttentionSignals(decoder.layers[run[-1]], entered, layout, decoder.rotary_emb, state.ledger)
        for index in run:
            _after_layer(session, index, state, prompt, previous, cache)
    return hidden


def run_layers(
    decoder: Any, layers: range, hidden: Tensor, mask: Any, rope: Any, positions: Tensor, cache: Any, **kwargs: Any
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


def _reduced_mask(config: Any, hidden: Tensor, layout: Layout) -> Any:
    """The causal mask of a reduced sequence, in the form the attention implementation wants."""
    return create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=layout.valid if layout.padded else None,
        past_key_values=None,
    )


def _reduce(
    session: Session,
    stage: BeforeLayer,
    state: PromptState,
    prompt: Prompt,
    hidden: Tensor,
    layout: Layout,
    previous: AttentionSignals | None,
    cache: Any,
) -> tuple[Tensor, Layout]:
    """Ask one stage for its decision and carry it out."""
    if max(layout.visual_counts) == 0:
        return hidden, layout
    decoder = session.decoder
    attention = {
        stage.layer: AttentionSignals(decoder.layers[stage.layer], hidden, layout, decoder.rotary_emb, state.ledger)
    }
    if previous is not None:
        # Right after its layer ran, the cache holds exactly the keys that layer computed.
        previous.cached_keys = cached_keys(cache, stage.layer - 1, previous.layout)
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
        decoder.norm,
    )
    with state.ledger.charging([count > 0 for count in layout.visual_counts]):
        decision = stage.select(view)
    if decision is None:
        return hidden, layout
    if isinstance(decision, Keep):
        if layout.keeps_everything(decision):
            return hidden, layout
        layout, hidden = layout.drop(decision, hidden, stage.renumber)
    else:
        layout, hidden = layout.replace(decision, hidden, stage.renumber)
    return hidden, layout


def cached_keys(cache: Any, layer: int, layout: Layout) -> Tensor | None:
    """The layer's keys [B, H_kv, n, hd] if the cache still holds the whole sequence."""
    if cache is None or len(cache.layers) <= layer:
        return None
    keys = cache.layers[layer].keys
    return keys if keys.shape[-2] == layout.valid.shape[1] else None


def _after_layer(
    session: Session, index: int, state: PromptState, prompt: Prompt, signals: AttentionSignals, cache: Any
) -> None:
    """Carry out the KV and FFN stages of a layer whose prefill is done."""
    activations = session.activations.get(index)
    layout = signals.layout
    for stage in session.choose[index] if cache is not None else ():
        assert activations is not None
        weight = session.decoder.layers[index].mlp.down_proj.weight
        session.defer_choice(cache, stage, FFNSignals(index, activations, layout, prompt, weight, state.ledger))
    if session.after[index] and cache is not None:
        layer_cache = cache.layers[index]
        signals.cached_keys = layer_cache.keys
        for stage in session.after[index]:
            view = KVSignals(
                index,
                layer_cache.keys,
                layer_cache.values,
                layout,
                prompt,
                state.ledger,
                signals,
                activations,
            )
            _shrink_kv(stage.select(view), state, index, layer_cache)
    session.activations.pop(index - 1, None)
    session.attended.pop(index - 1, None)


def _shrink_kv(decision: KeepKV | ZeroKV | None, state: PromptState, index: int, layer_cache: Any) -> None:
    if isinstance(decision, ZeroKV):
        gone = decision.mask[:, None, :, None]
        layer_cache.keys = layer_cache.keys.masked_fill(gone, 0)
        layer_cache.values = layer_cache.values.masked_fill(gone, 0)
        gone_now = decision.mask.sum(1).tolist()
        state.zeroed_kv = [before + now for before, now in zip(state.zeroed_kv, gone_now, strict=True)]
    elif isinstance(decision, KeepKV):
        gather = decision.index[..., None].expand(-1, -1, -1, layer_cache.keys.shape[-1])
        layer_cache.keys = layer_cache.keys.gather(2, gather)
        layer_cache.values = layer_cache.values.gather(2, gather)
        batch, width = decision.index.shape[0], decision.index.shape[2]
        state.kv_valid[index] = decision.valid
        counts = decision.counts
        if counts is None:
            counts = [width] * batch if decision.valid is None else decision.valid.sum(1).tolist()
        state.kv_lengths[index] = counts


def _decode(session, state, hidden, attention_mask, position_ids, cache, use_cache, kwargs) -> Tensor:
    decoder = session.decoder
    length = hidden.shape[1]
    if position_ids is None:
        position_ids = torch.arange(length, device=hidden.device)[None] + state.seen
    session.choose_neurons(cache)
    state.seen += length
    state.decode_steps += length
    contexts: dict[tuple, tuple] = {}
    session.active = state
    try:
        for index, layer in enumerate(decoder.layers[: decoder.config.num_hidden_layers]):
            valid, shift = state.kv_valid[index], state.shifts[index]
            kv_length = cache.get_seq_length(index)
            key = (id(valid), kv_length, id(shift))
            if key not in contexts:
                contexts[key] = _decode_context(decoder, hidden, attention_mask, position_ids, cache, index, state)
            mask, positions, rope = contexts[key]
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rope,
                position_ids=positions,
                past_key_values=cache,
                use_cache=use_cache,
                **kwargs,
            )
    finally:
        session.active = None
    return hidden


def _decode_context(decoder, hidden, attention_mask, position_ids, cache, index, state) -> tuple:
    """Mask, position ids and rotary embedding shared by layers with the same KV rows."""
    untouched = state.layouts[index] is state.prompt and state.kv_lengths[index] == state.prompt.lengths
    valid, shift = state.kv_valid[index], state.shifts[index]
    if not untouched:
        if valid is not None:
            new = valid.new_ones(valid.shape[0], cache.get_seq_length(index) + hidden.shape[1] - valid.shape[1])
            valid = torch.cat([valid, new], 1)
        attention_mask = valid
    mask = create_causal_mask(
        config=decoder.config,
        inputs_embeds=hidden,
        attention_mask=attention_mask,
        past_key_values=cache,
        position_ids=position_ids if untouched else None,
        layer_idx=index,
    )
    positions = position_ids if shift is None else position_ids - shift
    return mask, positions, decoder.rotary_emb(hidden, position_ids=positions)
