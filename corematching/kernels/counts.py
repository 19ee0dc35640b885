"""How many core neurons a token has: the one rule that every way of finding them follows."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def core_counts(width: int, rho: float, device: torch.device) -> Tensor:
    """Int32 [width + 1]: by its positive activations P, a token's core neurons, max(1, floor(rho * P)).

    The small constant keeps 0.2 * 35 = 7.000000000000001-type products and their 6.99... twins on the intended side.
    """
    positive = torch.arange(width + 1, dtype=torch.float64)
    counts = (positive * rho + 1e-9).floor().clamp(min=1).minimum(positive.clamp(min=1))
    return counts.to(torch.int32).to(device)
