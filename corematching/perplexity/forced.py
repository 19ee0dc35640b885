"""Teacher forcing through decode: what a model under a method would have said at every token of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corematching.engine.calls import decoding_after
from corematching.engine.trace import SampleTrace


@dataclass(frozen=True)
class Forced:
    """One window: of every token that a decode step predicts, T - 1 of them."""

    nll: Tensor
    """[T - 1], negative log likelihood in nats."""
    said: Tensor
    """Long [T - 1], the likeliest token."""
    targets: Tensor
    """Long [T - 1], the token of the text."""
    trace: SampleTrace


def force(model: Any, trace: Any, window: list[int], context: int) -> Forced:
    """Prefill ``context`` tokens of a window and decode the others, which the text dictates.

    Run inside the context of the method whose ``trace`` is given. As in generation, it chooses from the prefilled
    tokens and acts on the decoded ones. These run in one pass (see
    :func:`corematching.engine.calls.decoding_after`), which gives what one pass per token would.
    """
    ids = torch.tensor([window], device=model.device)
    with decoding_after(model, context):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=len(window) - context).logits
    scores, targets = logits[0, :-1].float(), ids[0, context + 1 :]
    (sample,) = trace.drain()
    nll = torch.nn.functional.cross_entropy(scores, targets, reduction="none")
    return Forced(nll.cpu(), scores.argmax(-1).cpu(), targets.cpu(), sample)
