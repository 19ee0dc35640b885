"""CPU: core neurons of a prompt, a block of tokens per thread.

Numpy's partition selects where torch's top-k half sorts, with a rank of its own for every token, and a block's
comparisons and counts stay in the core's cache.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from corematching.kernels.counts import core_counts

BLOCK = 64
"""Tokens of a block; their votes are counted in bytes, so at most 255."""


def core_neurons(activations: Tensor, valid: Tensor, rho: float, count: int) -> Tensor:
    """As :func:`corematching.methods.core.core_neurons`."""
    chosen = []
    number = torch.promote_types(activations.dtype, torch.float32)  # numpy has no bfloat16
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for sample, real in zip(activations.detach(), valid, strict=True):
            tokens = (sample if real.all() else sample[real]).to(number).numpy()
            blocks = (tokens[first : first + BLOCK] for first in range(0, len(tokens), BLOCK))
            votes = np.zeros(tokens.shape[1], np.int64)
            for found in pool.map(lambda block: _votes(block, rho), blocks):
                votes += found
            # Stable: of neurons with equally many votes the lower index comes first.
            chosen.append(np.sort(np.argsort(-votes, kind="stable")[:count]))
    return torch.from_numpy(np.stack(chosen))


def _votes(tokens: np.ndarray, rho: float) -> np.ndarray:
    """How many tokens of a block hold each neuron as core: [n, I] -> uint8 [I]."""
    positive = np.count_nonzero(tokens > 0, axis=1)
    width = tokens.shape[1]
    rank = width - core_counts(width, rho, torch.device("cpu")).numpy()[positive]
    threshold = np.full((len(tokens), 1), np.inf, tokens.dtype)
    for place, token in enumerate(tokens):
        if positive[place]:
            threshold[place] = np.partition(token, rank[place])[rank[place]]
    return (tokens >= threshold).sum(0, dtype=np.uint8)
