"""Triton kernels: core neurons of a prompt, without sorting.

The k-th largest of a row is found by bisection over the bits of its values: positive floats are ordered as the integers
with the same bits, and a row fits into one program's registers. Counts are integers, so results repeat exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from corematching.kernels.counts import core_counts

_ZERO_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Low bits of a float32 that are always zero when it came from this type; float16's subnormals included."""
_VOTE_BITS = 20
"""Prompts of up to 2^20 tokens."""


@triton.jit
def _vote(activations, valid, wanted, votes, width, length, ZERO_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """One token: its core neurons, those among the top of its positive activations, get a vote each."""
    row = tl.program_id(0).to(tl.int64)
    neuron = tl.arange(0, BLOCK)
    value = tl.load(activations + row * width + neuron, mask=neuron < width, other=0.0).to(tl.float32)
    key = tl.where(value > 0, value, 0.0).to(tl.int32, bitcast=True)
    enough = tl.load(wanted + tl.sum((key > 0).to(tl.int32)))
    threshold = tl.full((), 0, tl.int32)
    for step in range(31 - ZERO_BITS):
        candidate = threshold | (1 << (30 - step))
        threshold = tl.where(tl.sum((key >= candidate).to(tl.int32)) >= enough, candidate, threshold)
    # No float has the bits 2^31 - 1: padding votes for nothing. Nor does anyone for what is not positive.
    threshold = tl.where(tl.load(valid + row) != 0, tl.maximum(threshold, 1), 2147483647)
    tl.atomic_add(votes + (row // length) * width + neuron, 1, mask=key >= threshold)


@triton.jit
def _elect(votes, out, width, count, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """One prompt: the neurons with most votes, ascending; of equals the lower index."""
    row = tl.program_id(0).to(tl.int64)
    neuron = tl.arange(0, BLOCK)
    inside = neuron < width
    own = tl.load(votes + row * width + neuron, mask=inside, other=0).to(tl.int64)
    key = tl.where(inside, own * BLOCK + (BLOCK - 1 - neuron), -1)
    threshold = tl.full((), 0, tl.int64)
    for step in range(BITS):
        candidate = threshold | (tl.full((), 1, tl.int64) << (BITS - 1 - step))
        threshold = tl.where(tl.sum((key >= candidate).to(tl.int32)) >= count, candidate, threshold)
    chosen = key >= threshold
    place = tl.cumsum(chosen.to(tl.int32)) - 1
    tl.store(out + row * count + place, neuron.to(tl.int64), mask=chosen)


def core_neurons(activations: Tensor, valid: Tensor, rho: float, count: int) -> Tensor:
    """As :func:`corematching.methods.core.core_neurons`, of float32, float16 or bfloat16."""
    batch, length, width = activations.shape
    block = triton.next_power_of_2(width)
    warps = min(32, max(4, block // 1024))
    votes = torch.zeros(batch, width, dtype=torch.int32, device=activations.device)
    wanted = core_counts(width, rho, activations.device)
    _vote[(batch * length,)](
        activations.contiguous(),
        valid.to(torch.uint8).contiguous(),
        wanted,
        votes,
        width,
        length,
        ZERO_BITS=_ZERO_BITS[activations.dtype],
        BLOCK=block,
        num_warps=warps,
    )
    out = torch.empty(batch, count, dtype=torch.long, device=activations.device)
    bits = block.bit_length() - 1 + _VOTE_BITS
    _elect[(batch,)](votes, out, width, count, BITS=bits, BLOCK=block, num_warps=warps)
    return out
