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

LABELS = ("largest", "positive")
"""What counts as active: the largest activations by magnitude, or those above 0 (the labels of Deja Vu's code, made for
FFNs in which everything else is 0)."""
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


def labels_of(activations: Tensor, labels: str, count: int) -> Tensor:
    """Which activations a predictor is to find, [T, I] -> bool [T, I]: those above 0, or the ``count`` largest."""
    return activations > 0 if labels == "positive" else most_active(activations, count)


def train_predictor(
    samples: Samples,
    keep: float,
    rank: int,
    steps: int = 400,
    batch: int = 256,
    rate: float = 3e-3,
    seed: int = 0,
    labels: str = "largest",
    relu: bool = False,
) -> tuple[Predictor, float]:
    """Fit one layer's predictor to its active neurons.

    Form and loss are those of Deja Vu's training script: two linear maps, and cross entropy in which inactive neurons
    weigh as much as the share of active ones (plus 0.005), active ones the rest.

    Parameters
    ----------
    samples
        The layer's calibration tokens.
    keep
        Share of the FFN width that "largest" labels make up, and that recall is measured at.
    rank
        Width of the hidden layer.
    steps, batch, rate, seed
        AdamW steps with a linearly falling rate, tokens per step, starting rate, seed of weights and order.
    labels
        "largest" or "positive": see :data:`LABELS`.
    relu
        Put a ReLU between the maps, as PowerInfer does.

    Returns
    -------
    The predictor, and its recall on held-out tokens: the share of their ``keep`` largest activations by magnitude,
    which is what decoding needs, among the ``keep`` neurons it ranks first.
    """
    tokens, width = samples.activations.shape
    count = max(1, int(width * keep + 1e-9))
    active = labels_of(samples.activations, labels, count)
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
        wanted = targets[rows]
        share = wanted.mean() + 0.005
        scores = Predictor(first, second, wanted, relu)(inputs[rows])
        loss = binary_cross_entropy_with_logits(scores, wanted, weight=wanted * (1 - share) + share)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predictor = Predictor(first.detach(), second.detach(), active.float().mean(0), relu)
    held_out = slice(cut, None) if cut < tokens else slice(None)
    found = recall(predictor(samples.inputs[held_out]), most_active(samples.activations[held_out], count))
    return predictor, float(found.mean())
