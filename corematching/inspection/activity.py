"""How many FFN neurons a model activates, and on how few of them its tokens agree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corematching.methods.core import token_core_neurons
from corematching.models.families import family_of


@dataclass(frozen=True)
class Activity:
    """One decoder layer, averaged over prompts.

    Attributes
    ----------
    positive_visual, positive_text : float
        Share of a token's activations that is positive.
    concentration : float
        Share of all votes for core neurons that the ``beta`` neurons with the most votes get; ``beta`` itself where
        votes spread evenly.
    """

    positive_visual: float
    positive_text: float
    concentration: float


def activity(model: Any, prompts: Iterable[Any], rho: float = 0.2, beta: float = 0.4) -> list[Activity]:
    """Activity of every decoder layer over prompts, run densely one at a time.

    Parameters
    ----------
    model
        A supported model.
    prompts
        What its processor returned, batches of one prompt.
    rho, beta
        Core-neuron parameters; see :mod:`corematching.methods.core`.
    """
    family = family_of(model.config)
    layers: Any = family.decoder(model).layers
    entered: list[Tensor] = []
    hooks = [layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: entered.append(args[0])) for layer in layers]
    sums, count = torch.zeros(len(layers), 3), 0
    try:
        for inputs in prompts:
            entered.clear()
            with torch.inference_mode():
                model(**inputs, logits_to_keep=1)
            visual = inputs["input_ids"][0] == family.image_token_id(model.config)
            sums += torch.stack([_layer(activations[0].float(), visual, rho, beta) for activations in entered])
            count += 1
    finally:
        for hook in hooks:
            hook.remove()
    return [Activity(*row) for row in (sums / max(count, 1)).tolist()]


def _layer(activations: Tensor, visual: Tensor, rho: float, beta: float) -> Tensor:
    """The three numbers of one layer from activations [n, I] and which of the tokens are visual."""
    positive = (activations > 0).float().mean(-1)
    votes = token_core_neurons(activations, rho).float().sum(0)
    most = votes.topk(max(1, int(beta * len(votes) + 1e-9))).values.sum() / votes.sum().clamp(min=1)
    return torch.stack([positive[visual].mean(), positive[~visual].mean(), most]).cpu()
