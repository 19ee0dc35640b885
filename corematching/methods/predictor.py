"""What predicts a layer's active neurons from its input: a small two-layer network per FFN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Predictor:
    """Two linear maps without biases that score the neurons of one FFN, and what calibration knows about them.

    Parameters
    ----------
    first
        [r, d].
    second
        [I, r].
    frequency
        [I]: share of calibration tokens for which the neuron was active, in the sense the predictor was trained for.
    relu
        Whether a ReLU stands between the maps (PowerInfer's form; Deja Vu's has none).
    """

    first: Tensor
    second: Tensor
    frequency: Tensor
    relu: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Scores [T, I] of the neurons for FFN inputs [T, d], higher = more likely active."""
        hidden = x @ self.first.T
        return (hidden.relu() if self.relu else hidden) @ self.second.T

    @property
    def flops(self) -> float:
        """Cost per token, 2 per multiply-add."""
        return 2.0 * (self.first.numel() + self.second.numel())


def most_active(activations: Tensor, count: int) -> Tensor:
    """The ``count`` largest activations of every token by magnitude, [T, I] -> bool [T, I]."""
    index = activations.abs().topk(count, dim=1).indices
    return torch.zeros_like(activations, dtype=torch.bool).scatter(1, index, True)


def recall(scores: Tensor, active: Tensor) -> Tensor:
    """Share of each token's active neurons among as many best-scored ones: [T, I], bool [T, I] -> [T]."""
    count = int(active[0].sum())
    found = active.gather(1, scores.topk(count, dim=1).indices)
    return found.float().mean(1)
