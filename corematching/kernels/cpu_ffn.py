"""CPU: a gated FFN's matrix-vector products over chosen neurons, read where they lie by torch's sparse operators."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

DTYPES = frozenset({torch.float32})
"""What torch computes fast here: its sampled product knows no half precision, its bags no threads for float64."""
FEWEST = 16
"""Shares, where there are fewer threads: measured a few percent faster than one per thread with two of them."""


@cache
def trusted(threads: int) -> bool:
    """Whether torch's sampled product can be relied on with so many threads.

    It deals its rows out to as many threads as torch asks for. If OpenMP grants fewer (OMP_THREAD_LIMIT, OMP_DYNAMIC),
    the rows of the others are left out without an error.
    """
    if os.environ.get("OMP_DYNAMIC", "false").strip().lower() not in ("false", "0", ""):
        return False
    _accept_beta()
    rows = 16 * threads
    every = torch.sparse_csr_tensor(
        torch.arange(rows + 1),
        torch.zeros(rows, dtype=torch.long),
        torch.zeros(rows),
        (rows, 1),
        check_invariants=False,
    )
    left, right = torch.ones(rows, 64), torch.ones(64, 1)
    return bool((torch.sparse.sampled_addmm(every, left, right, beta=0.0).values() == 64).all())


@cache
def _accept_beta() -> None:
    """Torch says once per process that its sparse tensors are in beta; no user can do anything about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = torch.ones(1, dtype=torch.long)
        torch.sparse_csr_tensor(torch.tensor([0, 1]), one - 1, one.float(), (1, 1), check_invariants=False)


def chosen_ffn(
    gate: Tensor, up: Tensor, down: Tensor, index: Tensor, x: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """``down[index].T @ (act(gate[index] @ x) * (up[index] @ x))`` without copying rows.

    Neurons are dealt out in equal shares: a sampled dense product has one row per share, and the down rows of a share
    are one weighted bag. Partial sums are added in a fixed order, so results repeat exactly for a number of threads.

    Parameters and result as in :func:`corematching.kernels.gpu_ffn.chosen_ffn`, but for ``activation``, which is the
    FFN's function itself.
    """
    k, (width, d) = len(index), gate.shape
    if k == 0:
        return torch.zeros_like(x)
    _accept_beta()
    shares = min(max(FEWEST, torch.get_num_threads()), k)
    bounds = torch.arange(shares + 1) * k // shares
    chosen = torch.sparse_csr_tensor(bounds, index, x.new_zeros(k), (shares, width), check_invariants=False)
    spread = x.reshape(1, d).repeat(shares, 1)
    gated, raised = (torch.sparse.sampled_addmm(chosen, spread, weight.t(), beta=0.0).values() for weight in (gate, up))
    partial = functional.embedding_bag(
        index, down, bounds[:-1], mode="sum", per_sample_weights=activation(gated) * raised
    )
    return partial.sum(0).view(x.shape)
