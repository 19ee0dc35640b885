"""The oracle of every family: tokens that left before a decoder layer are keys that a stock model hides from it on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

NEW = 5
"""Decoded tokens."""


def answered(model: Any, inputs: dict[str, Tensor], steps: int = NEW + 1) -> tuple[Tensor, Tensor]:
    """Tokens [B, steps] and the logits they come from [B, steps, vocabulary]."""
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, 1)


@contextmanager
def hidden_keys(layers: Sequence[Any], seen: Sequence[Tensor]) -> Iterator[None]:
    """Let each decoder layer of a stock model see some keys only, in forward passes without a cache.

    Parameters
    ----------
    layers
        The decoder's layers.
    seen
        Per layer: bool [B, n], the keys that are there (padding is not).
    """

    def hide(keys: Tensor) -> Any:
        length = keys.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        # A key that is gone stays in its own row: a softmax over nothing is not a number, and nobody reads the row.
        mask = (causal & keys[:, None]) | torch.eye(length, dtype=torch.bool)

        def before(module: Any, positional: Any, given: dict[str, Any]) -> Any:
            return positional, {**given, "attention_mask": mask[:, None]}

        return before

    handles = [
        layer.register_forward_pre_hook(hide(keys), with_kwargs=True) for layer, keys in zip(layers, seen, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def keys_left(inputs: dict[str, Tensor], image_token: int, samples: Sequence[Any]) -> list[Tensor]:
    """Per layer, bool [B, n]: which tokens of a left-padded batch entered it, by the samples' traces."""
    valid = inputs["attention_mask"].bool()
    depth = len(samples[0].visual_tokens)
    left = [valid.clone() for _ in range(depth)]
    for row, sample in enumerate(samples):
        visual = (inputs["input_ids"][row] == image_token).nonzero()[:, 0]
        for layer in range(depth):
            left[layer][row, visual] = False
            left[layer][row, visual[sample.visual_tokens[layer]]] = True
    return left


def lengthened(inputs: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """The prompts with further text tokens [B, t] behind them."""
    ones = torch.ones_like(tokens)
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], tokens], 1)}
    longer["attention_mask"] = torch.cat([inputs["attention_mask"], ones], 1)
    if "mm_token_type_ids" in inputs:
        longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tokens)], 1)
    return longer
