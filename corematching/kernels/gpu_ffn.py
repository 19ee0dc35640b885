"""Triton kernels: a gated FFN's matrix-vector products over chosen neurons, gathered while they are read.

Two launches and one small sum. The first computes the activations of the chosen neurons (a dot product with one gate
row and one up row each); the second adds up the chosen down rows, weighted by them, in slices whose partial sums are
added in a fixed order, so that results repeat exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 4, 512  # tile of the first kernel: neurons x input entries
_CHUNK, _WIDTH, _SLICES = 8, 256, 32  # tile of the second: neurons x output entries; slices of the neuron list


@triton.jit
def _activate(x, gate, up, index, out, k, d, RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = place < k
    start = tl.load(index + place, mask=real, other=0).to(tl.int64)[:, None] * d
    gate_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    up_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, d, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < d
        value = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        tile = real[:, None] & inside[None, :]
        gate_sum += tl.load(gate + start + column[None, :], mask=tile, other=0.0).to(tl.float32) * value
        up_sum += tl.load(up + start + column[None, :], mask=tile, other=0.0).to(tl.float32) * value
    g = tl.sum(gate_sum, axis=1)
    g = tl.maximum(g, 0.0) if RELU else g / (1.0 + tl.exp(-g))
    tl.store(out + place, g * tl.sum(up_sum, axis=1), mask=real)


@triton.jit
def _add_up(act, down, index, out, k, d, per_slice, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = column < d
    begin = tl.program_id(1) * per_slice
    end = tl.minimum(begin + per_slice, k)
    total = tl.zeros((CHUNK, WIDTH), tl.float32)
    for first in range(0, per_slice, CHUNK):
        place = begin + first + tl.arange(0, CHUNK)
        real = place < end
        start = tl.load(index + place, mask=real, other=0).to(tl.int64)[:, None] * d
        weight = tl.load(act + place, mask=real, other=0.0)[:, None]
        tile = real[:, None] & inside[None, :]
        total += tl.load(down + start + column[None, :], mask=tile, other=0.0).to(tl.float32) * weight
    tl.store(out + tl.program_id(1) * d + column, tl.sum(total, axis=0), mask=inside)


def chosen_ffn(gate: Tensor, up: Tensor, down: Tensor, index: Tensor, x: Tensor, activation: str) -> Tensor:
    """``down[index].T @ (act(gate[index] @ x) * (up[index] @ x))`` without copying rows.

    Parameters
    ----------
    gate, up, down
        [I, d], contiguous: one row per neuron in each.
    index
        Long [k].
    x
        [..., d], one token.
    activation
        "silu" or "relu".

    Returns
    -------
    Shape and dtype of ``x``; sums are kept in float32.
    """
    k, d = index.shape[0], gate.shape[1]
    if k == 0:
        return torch.zeros_like(x)
    x = x.contiguous()
    act = torch.empty(k, dtype=torch.float32, device=x.device)
    _activate[(triton.cdiv(k, _ROWS),)](
        x, gate, up, index, act, k, d, RELU=activation == "relu", ROWS=_ROWS, COLUMNS=_COLUMNS
    )
    partial = torch.empty(_SLICES, d, dtype=torch.float32, device=x.device)
    per_slice = triton.cdiv(triton.cdiv(k, _SLICES), _CHUNK) * _CHUNK
    _add_up[(triton.cdiv(d, _WIDTH), _SLICES)](act, down, index, partial, k, d, per_slice, CHUNK=_CHUNK, WIDTH=_WIDTH)
    return partial.sum(0).to(x.dtype).view(x.shape)
