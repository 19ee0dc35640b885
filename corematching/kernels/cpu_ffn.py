"""CPU: a gated FFN's matrix-vector products over chosen neurons, read where they lie by torch's sparse operators."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

DTYPES = frozenset({torch.float32, torch.float64})
"""What torch's sampled product computes on a CPU."""
SHARES = 8
"""Per thread: memory does not serve all threads equally fast, so equal shares end at different times."""


@cache
def _accept_beta() -> None:
    """Torch says once per process that its sparse tensors are in beta; no user can do anything about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = torch.ones(1, dtype=torch.long)
        torch.sparse_csr_tensor(torch.tensor([0, 1]), one - 1, one.float(), (1, 1), check_invariants=False)


def gather_ffn(
    gate: Tensor, up: Tensor, down: Tensor, index: Tensor, x: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """``down[index].T @ (act(gate[index] @ x) * (up[index] @ x))`` without copying rows.

    Threads take equal shares of the neurons: a sampled dense product has one row per share, and the down rows of a
    share are one weighted bag. Partial sums are added in a fixed order, so results repeat exactly for a number of
    threads.

    Parameters
    ----------
    gate, up, down
        [I, d], contiguous: one row per neuron in each.
    index
        Long [k].
    x
        [..., d], one token.
    activation
        The FFN's activation function.

    Returns
    -------
    Shape and dtype of ``x``.
    """
    k, (width, d) = len(index), gate.shape
    if k == 0:
        return torch.zeros_like(x)
    _accept_beta()
    shares = min(SHARES * torch.get_num_threads(), k)
    bounds = torch.arange(shares + 1) * k // shares
    chosen = torch.sparse_csr_tensor(bounds, index, x.new_zeros(k), (shares, width), check_invariants=False)
    spread = x.reshape(1, d).expand(shares, d)
    gated, raised = (torch.sparse.sampled_addmm(chosen, spread, weight.t(), beta=0.0).values() for weight in (gate, up))
    partial = functional.embedding_bag(
        index, down, bounds[:-1], mode="sum", per_sample_weights=activation(gated) * raised
    )
    return partial.sum(0).view(x.shape)
