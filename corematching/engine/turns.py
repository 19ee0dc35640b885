"""Opening a turn: what each layer holds from earlier ones, and the state that the new one is booked on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from corematching.engine.cache import Conversation
from corematching.engine.calls import check_context
from corematching.engine.layout import NO_PAST, Layout, Past, joined
from corematching.engine.state import PromptState
from corematching.engine.views import Prompt
from corematching.engine.visual import images_of, tower_tokens
from corematching.errors import UserError

if TYPE_CHECKING:
    from corematching.engine.session import Session


def pasts(talk: Conversation | None, cache: Any, attention_mask: Tensor | None, depth: int) -> list[Past]:
    """Per layer: what the cache holds before a turn; decoded rows that the attention mask hides are not valid."""
    if talk is None or talk.state is None:
        return [NO_PAST] * depth
    state, decoded = talk.state, talk.decoded
    tail = None
    if attention_mask is not None and decoded:
        tail = attention_mask[:, talk.prefilled : talk.seen].bool()
        tail = None if bool(tail.all()) else tail
    order = list(range(len(state.kv_lengths[0]))) if state.order is None else state.order.tolist()
    counted = [decoded] * len(order) if tail is None else tail.sum(1).tolist()
    known: dict[tuple, Past] = {}
    layers = []
    for layer in range(depth):
        rows, valid, shift = cache.layers[layer].rows, state.kv_valid[layer], state.shifts[layer]
        lengths = tuple(
            min(rows, state.kv_lengths[layer][row] + more) for row, more in zip(order, counted, strict=True)
        )
        key = (rows, id(valid), id(shift), lengths)
        if key not in known:
            before = rows - decoded
            first = Past(before, None if valid is None else valid[:, :before])
            known[key] = Past(rows, joined(first, tail, decoded), shift, lengths)
        layers.append(known[key])
    return layers


def padding_first(mask: Tensor | None) -> Tensor | None:
    """Long [B, n] that brings padding (of later turns in a batch, or on the right) to the front; None if it is there.

    Whatever drops tokens expects left padding, as generation does.
    """
    if mask is None:
        return None
    valid = mask.bool()
    if not bool((valid[:, :-1] & ~valid[:, 1:]).any()):
        return None
    return valid.to(torch.int8).argsort(dim=1, stable=True)


def open_turn(
    session: Session,
    embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    talk: Conversation | None,
    past: list[Past],
    order: Tensor | None = None,
) -> tuple[PromptState, Prompt]:
    """Open the state of a new prompt or turn; ``order`` (long [B, n]): where its tokens stood when they came in."""
    ids = None if session.input_ids is None else session.input_ids[:, : embeds.shape[1]]
    if ids is None or ids.shape != embeds.shape[:2]:
        raise UserError("pass input_ids (not inputs_embeds): visual tokens are found by their image token id")
    if order is not None:
        ids = ids.gather(1, order)
    valid = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    start = _start(position_ids, valid) if past[0].rows and position_ids.dim() == 2 else None
    image_token = session.family.image_token_id(session.model.config)
    layout = Layout.of_prompt(ids, valid, position_ids, image_token, start, order)
    images = images_of(session, ids, layout.visual_counts)
    earlier = _earlier(talk)
    check_context(session.model.config, layout.lengths, earlier)
    state = PromptState(layout, images, past, earlier)
    state.kv_row_bytes = session.kv_row_bytes(embeds.element_size())
    state.predictor_weights = sum(ffn.predictor.flops / 2 for ffn in session.tokenwise.values())
    state.vision_tokens, state.vision_mlp_tokens = tower_tokens(session, images)
    state.projected_tokens = list(layout.visual_counts)
    session.current = state
    session.activations.clear()
    session.attended.clear()
    prompt = Prompt(
        ids,
        embeds,
        layout.visual_id > -2,
        valid,
        list(layout.lengths),
        list(layout.visual_counts),
        images,
    )
    return state, prompt


def _start(position_ids: Tensor, valid: Tensor) -> Tensor:
    """Long [B, 1]: position id of each sample's first token."""
    return position_ids.expand_as(valid).gather(1, valid.to(torch.int8).argmax(1, keepdim=True))


def _earlier(talk: Conversation | None) -> list[int]:
    """Tokens of earlier turns per sample, before any reduction."""
    if talk is None or talk.state is None:
        return []
    state, decoded = talk.state, talk.decoded
    tokens = state.prompt.lengths
    if state.past_tokens:
        tokens = [before + own for before, own in zip(state.past_tokens, tokens, strict=True)]
    order = range(len(tokens)) if state.order is None else state.order.tolist()
    return [tokens[row] + decoded for row in order]
