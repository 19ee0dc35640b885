"""How many prompt tokens a forward pass may hold, from the memory that is free."""

from __future__ import annotations

from typing import Any

from corematching.cost.memory import free_memory
from corematching.models.families import head_width

_SHARE = 0.5
"""Of the free memory that is planned with; the rest is for what methods compute and for others on the machine."""
_LEAST, _MOST = 2**11, 2**15
"""Fewer tokens are not worth planning (a batch that does not fit is halved anyway); more bring no speed."""


def bytes_per_token(model: Any, remembered: int = 0) -> int:
    """What a prompt token takes while a batch runs, about.

    Its KV rows in every layer, twice where a layer's are copied into place; what layers leave for other methods; and
    the widest moment of a layer: hidden states, queries, keys, values, and the FFN's three products.

    Parameters
    ----------
    model
        A transformers model.
    remembered
        Decoder layers whose output is kept for other methods.
    """
    text = model.config.get_text_config()
    head_dim = head_width(text)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    rows = 2 * heads * head_dim
    moment = 4 * text.hidden_size + rows + 3 * text.intermediate_size
    return (2 * rows * text.num_hidden_layers + remembered * (rows + text.hidden_size) + moment) * model.dtype.itemsize


def token_budget(model: Any, remembered: int = 0, free: int | None = None) -> int:
    """Most prompt tokens of a batch, padding included.

    Parameters
    ----------
    model, remembered
        See :func:`bytes_per_token`.
    free
        Bytes; by default what is free now on the model's device.
    """
    free = free_memory(model.device) if free is None else free
    if free is None:
        return _MOST
    return max(_LEAST, min(_MOST, int(_SHARE * free) // bytes_per_token(model, remembered)))
