"""Selection primitives shared by the methods: pure tensor functions, higher score = keep."""

from __future__ import annotations

import torch
from torch import Tensor

from corematching.methods.base import Keep
from corematching.methods.parameters import Budget, count_of


def keep_top(scores: Tensor, keep: Budget, valid: Tensor, counts: list[int], totals: list[int] | None = None) -> Keep:
    """Keep the highest-scoring tokens of every sample.

    Parameters
    ----------
    scores
        [B, V], higher = keep. Ties go to the lower index.
    keep
        Budget: a count, or a fraction of ``totals``.
    valid
        Bool [B, V]: False on padded slots.
    counts
        Tokens per sample now.
    totals
        Tokens a fraction refers to; defaults to ``counts``.
    """
    wanted = [min(now, count_of(keep, total)) for now, total in zip(counts, totals or counts, strict=True)]
    return Keep(top_mask(scores, valid, wanted), wanted)


def top_mask(scores: Tensor, valid: Tensor, counts: list[int]) -> Tensor:
    """The ``counts[b]`` highest-scoring valid slots of every sample: [B, V] -> bool [B, V]; ties to the lower index."""
    order = scores.float().masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    chosen = torch.arange(order.shape[1], device=order.device) < torch.tensor(counts, device=order.device)[:, None]
    return torch.zeros_like(valid).scatter(1, order, chosen) & valid


def keep_top_patches(scores: Tensor, keep: Budget) -> Keep:
    """Keep the highest-scoring patches of every image: [N, P] scores, no padding."""
    images, patches = scores.shape
    return keep_top(scores, keep, torch.ones_like(scores, dtype=torch.bool), [patches] * images)


def elbow_keep(scores: Tensor, valid: Tensor, strict: bool = False) -> Tensor:
    """Keep tokens at or above the elbow of the sorted score curve ("maximum geometric distance").

    The curve is (rank, score) with scores sorted in descending order; the elbow is its point farthest from the chord
    between the first and the last point, the first one on ties. Axes are not normalised. Source: CoreMatching, section
    on core tokens. At least one token stays; scores that are all equal keep every token, as nothing tells them apart.

    Parameters
    ----------
    scores
        [B, V], exact integers or floats. NaN takes no part in the curve and is not kept, unless nothing else is there.
    valid
        Bool [B, V]: padded slots take no part in the curve.
    strict
        Keep tokens above the elbow only, as the published code does. That can be none: on a flat curve, or where many
        tokens share the highest score.

    Returns
    -------
    Bool [B, V].
    """
    scores = scores.double()
    ranked = valid & ~scores.isnan()
    ranked = torch.where(ranked.any(1, keepdim=True), ranked, valid)
    scores = scores.nan_to_num(0.0)
    count = ranked.sum(1, keepdim=True)
    curve = scores.masked_fill(~ranked, -torch.inf).sort(dim=1, descending=True).values
    rank = torch.arange(scores.shape[1], device=scores.device, dtype=scores.dtype).expand_as(curve)
    last = curve.gather(1, (count - 1).clamp(min=0))
    first, run = curve[:, :1], (count - 1).clamp(min=1).to(scores.dtype)
    # Twice the triangle's area over the chord's length; the length is constant per sample and cannot move the maximum.
    distance = ((last - first) * rank - run * (curve - first)).abs()
    distance = distance.masked_fill(rank >= count, -1.0)
    elbow = curve.gather(1, distance.argmax(dim=1, keepdim=True))
    return ((scores > elbow) if strict else (scores >= elbow)) & ranked


def hashed_noise(keys: Tensor, width: int, seed: int) -> Tensor:
    """Uniform noise [B, width] that depends only on each row's integer key and the seed.

    The same sample gets the same noise whatever its batch or device, without moving data off the device.
    """
    index = torch.arange(1, width + 1, device=keys.device, dtype=torch.long)
    salt = ((seed + 1) * 3935559000370003845 + 2**63) % 2**64 - 2**63  # as 64-bit arithmetic would leave it
    state = keys[:, None] * 2862933555777941757 + index * 3202034522624059733 + salt
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        # A logical right shift: torch's is arithmetic, so the sign's copies are masked away.
        state = (state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((state >> 11) & ((1 << 53) - 1)).double() / float(1 << 53)


def sample_keys(input_ids: Tensor, valid: Tensor) -> Tensor:
    """One integer key [B] per prompt, the same however the prompt is padded."""
    power = valid.long().cumsum(1)
    mixed = (input_ids + 1) * (power * 6364136223846793005 + 1442695040888963407)
    return (mixed * valid).sum(1)


def tokens_at(values: Tensor, index: Tensor) -> Tensor:
    """Tokens of [B, n, d] at long [B, m]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
