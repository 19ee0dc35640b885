"""What methods that choose KV rows before each decode step share: budgets, scores by KV head, blocks of rows."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from corematching.errors import UserError
from corematching.methods.base import ReadRows
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


@dataclass(frozen=True)
class Blocks:
    """Rows in three parts: the first ones, blocks of equal size, and the last ones, which no whole block reaches."""

    first: int
    size: int
    last: int
    """Rows at the end that blocks leave alone."""

    def count(self, rows: int) -> int:
        """Whole blocks among so many rows."""
        return max(0, (rows - self.last - self.first) // self.size)

    def read(self, chosen: Tensor, count: int, rows: int) -> ReadRows | None:
        """Read some of ``count`` blocks (long [H_kv, k], ascending) and the rows outside them; None for everything."""
        if chosen.shape[1] == count:
            return None
        inside = chosen[..., None] * self.size + self.first + torch.arange(self.size, device=chosen.device)
        parts = [
            torch.arange(self.first, device=chosen.device).expand(len(chosen), -1),
            inside.flatten(1),
            torch.arange(self.first + count * self.size, rows, device=chosen.device).expand(len(chosen), -1),
        ]
        return ReadRows(torch.cat(parts, 1))


def check_parts(keep: Budget, first: Budget, last: Budget) -> None:
    """Refuse first and last rows that, where comparable, leave nothing of the budget to choose."""
    fixed = sum(part for part in (first, last) if isinstance(part, float))
    counts = sum(part for part in (first, last) if isinstance(part, int))
    if fixed >= 1 or (isinstance(keep, int) and counts + fixed * keep >= keep):
        raise UserError(f"first={first} and last={last} are not valid: together they must be below keep={keep}")


def part_of(part: Budget, whole: int) -> int:
    """A count, or a fraction of a budget; at least 1, at most the budget."""
    return min(whole, part if isinstance(part, int) else max(1, round(part * whole)))
