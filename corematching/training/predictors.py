"""Training the predictors of ``dejavu`` and ``powerinfer`` on calibration prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from corematching.methods.predictor import Predictor, most_active, recall
from corematching.models.families import family_of

HELD_OUT = 0.2
"""Share of the calibration tokens, the last ones, on which recall is measured."""


@dataclass(frozen=True)
class Samples:
    """What one layer's FFN was given and what its neurons did, for T tokens."""

    inputs: Tensor
    """[T, d]."""
    activations: Tensor
    """[T, I]."""


@torch.no_grad()
def collect(
    model: Any, prompts: Iterable[dict[str, Tensor]], answer_tokens: int = 8, question_tokens: int = 16
) -> dict[int, Samples]:
    """Run the dense model over prompts (one at a time) and note every layer's FFN inputs and activations.

    Taken are the last ``question_tokens`` of the prompt and up to ``answer_tokens`` decoded ones: the tokens most like
    those that predictors will see in decode.
    """
    decoder: Any = family_of(model.config).decoder(model)
    layers = decoder.layers[: decoder.config.num_hidden_layers]
    seen: dict[tuple[int, str], list[Tensor]] = defaultdict(list)

    def note(key: tuple[int, str], module: Any, args: tuple) -> None:
        seen[key].append(args[0][0, -question_tokens:].float().cpu())

    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.mlp.register_forward_pre_hook(partial(note, (index, "inputs"))))
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(partial(note, (index, "activations"))))
    try:
        for prompt in prompts:
            model.generate(**prompt, max_new_tokens=answer_tokens, do_sample=False)
    finally:
        for handle in handles:
            handle.remove()
    return {
        index: Samples(torch.cat(seen[index, "inputs"]), torch.cat(seen[index, "activations"]))
        for index in range(len(layers))
    }


def train_predictor(
    samples: Samples, keep: float, rank: int, steps: int = 400, batch: int = 256, rate: float = 3e-3, seed: int = 0
) -> tuple[Predictor, float]:
    """Fit one layer's predictor to the ``keep`` share of its neurons with the largest activations.

    Parameters
    ----------
    samples
        The layer's calibration tokens.
    keep
        Share of the FFN width to predict.
    rank
        Width of the hidden layer.
    steps, batch, rate, seed
        AdamW steps with a linearly falling rate, tokens per step, starting rate, seed of weights and order.

    Returns
    -------
    The predictor, and its recall on held-out tokens: the share of their neurons it ranks among the first ``keep``.
    """
    tokens, width = samples.activations.shape
    active = most_active(samples.activations, max(1, int(width * keep + 1e-9)))
    cut = max(1, round(tokens * (1 - HELD_OUT)))
    inputs, targets = samples.inputs[:cut], active[:cut].float()
    generator = torch.Generator().manual_seed(seed)
    d = inputs.shape[1]
    first = (torch.randn(rank, d, generator=generator) * d**-0.5).requires_grad_()
    second = (torch.randn(width, rank, generator=generator) * rank**-0.5).requires_grad_()
    optimizer = torch.optim.AdamW([first, second], lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        rows = torch.randint(cut, (min(batch, cut),), generator=generator)
        scores = torch.relu(inputs[rows] @ first.T) @ second.T
        loss = binary_cross_entropy_with_logits(scores, targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predictor = Predictor(first.detach(), second.detach(), active.float().mean(0))
    held_out = slice(cut, None) if cut < tokens else slice(None)
    found = recall(predictor(samples.inputs[held_out]), active[held_out])
    return predictor, float(found.mean())
