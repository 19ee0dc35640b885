"""Greedy decoding of a batch whose samples leave it as their answers end.

transformers' ``generate`` computes every row until the last one has ended; where the model's own settings ask for
nothing but the most likely token, this loop gives the same tokens for less work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

_NEUTRAL = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "diversity_penalty": 0.0,
}
_UNSET = (
    *("min_new_tokens", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens"),
    *("begin_suppress_tokens", "sequence_bias", "exponential_decay_length_penalty", "guidance_scale", "stop_strings"),
    *("prompt_lookup_num_tokens", "token_healing", "watermarking_config"),
)
_LEAVE = 0.25
"""Ended rows leave once they are this share of the batch: leaving copies the KV cache of those who stay."""


def is_plain(generation_config: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether ``generate`` with these arguments means: take the most likely token, up to an end token or a limit."""

    def value(name: str) -> Any:
        own = arguments.get(name)
        return getattr(generation_config, name, None) if own is None else own

    neutral = all(value(name) in (None, usual) for name, usual in _NEUTRAL.items())
    unset = all(not value(name) for name in _UNSET)
    return neutral and unset and not arguments.get("do_sample") and (arguments.get("num_beams") or 1) == 1


def decode(model: Any, inputs: Mapping[str, Tensor], limit: int, ends: Sequence[int], pad: int) -> Tensor:
    """Long [B, T <= limit]: each row's most likely tokens up to its end token, then padding.

    Parameters
    ----------
    inputs
        ``input_ids`` and ``attention_mask`` [B, n], left-padded, and ``pixel_values`` if there are images.
    """
    mask = inputs["attention_mask"]
    cache = DynamicCache(config=model.config.get_text_config())
    output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1, position_ids=_positions(mask))
    stops = torch.tensor(list(ends), device=mask.device)
    answers = mask.new_full((len(mask), limit), pad)
    rows, running = torch.arange(len(mask), device=mask.device), torch.ones(len(mask), dtype=torch.bool)
    for step in range(limit):
        token = output.logits[:, -1].argmax(-1)
        token = torch.where(running.to(token.device), token, pad)
        answers[rows, step] = token
        running &= ~torch.isin(token, stops).cpu()
        if step + 1 == limit or not running.any():
            return answers[:, : step + 1]
        if (~running).float().mean() >= _LEAVE:
            stay = running.nonzero()[:, 0].to(mask.device)
            cache.batch_select_indices(stay)
            rows, mask, token, running = rows[stay], mask[stay], token[stay], running[running]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        output = model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=_positions(mask)[:, -1:],
            past_key_values=cache,
            use_cache=True,
        )
    return answers


def _positions(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(1) - 1).clamp(min=0)
