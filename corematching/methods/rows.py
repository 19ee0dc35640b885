"""What methods that choose KV rows before each decode step share: budgets, scores by KV head, blocks of rows."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from corematching.methods.parameters import Budget, count_of

EVERYTHING = sys.maxsize
"""More rows than there can be."""


def row_budget(keep: Budget, rows: int) -> int:
    """Rows that a step may read of a cache that holds ``rows`` after prefill; a fraction of 1 is everything."""
    return EVERYTHING if isinstance(keep, float) and keep == 1.0 else count_of(keep, rows) if keep < 1 else int(keep)


def strongest_of_group(attention: Tensor, kv_heads: int) -> Tensor:
    """Attention [H, n] of query heads -> [H_kv, n], the largest of those that share a KV head."""
    return attention.unflatten(0, (kv_heads, -1)).amax(1)


def with_own_row(index: Tensor, rows: int) -> Tensor:
    """Long [H_kv, K] and, behind it, the step's own row, the last of ``rows``."""
    own = torch.full_like(index[:, :1], rows - 1)
    return torch.cat([index, own], 1)
