"""Decode-time FFNs that compute chosen neurons only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class SlicedFFN:
    """A gated FFN cut down to some neurons: contiguous copies of their gate, up and down weights.

    Parameters
    ----------
    mlp
        Module with ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn`` (weights [I, d], [I, d], [d, I]).
    index
        Long [k]: neurons to keep.
    """

    mode = "sliced"

    def __init__(self, mlp: Any, index: Tensor) -> None:
        self.act = mlp.act_fn
        self.gate = mlp.gate_proj.weight.index_select(0, index)
        self.up = mlp.up_proj.weight.index_select(0, index)
        self.down = mlp.down_proj.weight.index_select(1, index)
        self.gate_bias, self.up_bias = (
            None if linear.bias is None else linear.bias.index_select(0, index)
            for linear in (mlp.gate_proj, mlp.up_proj)
        )
        self.down_bias = mlp.down_proj.bias

    def __call__(self, x: Tensor) -> Tensor:
        """[B, q, d] -> [B, q, d]."""
        gate = self.act(functional.linear(x, self.gate, self.gate_bias))
        return functional.linear(gate * functional.linear(x, self.up, self.up_bias), self.down, self.down_bias)


class MaskedFFN:
    """The dense FFN with unchosen activations zeroed, for batches whose samples chose different neurons.

    Mathematically what :class:`SlicedFFN` computes for each sample, but nothing is saved.
    """

    mode = "masked"

    def __init__(self, mlp: Any, index: Tensor) -> None:
        self.mlp = mlp
        width = mlp.gate_proj.weight.shape[0]
        self.mask = torch.zeros(index.shape[0], 1, width, dtype=mlp.gate_proj.weight.dtype, device=index.device)
        self.mask.scatter_(2, index[:, None], 1)

    def __call__(self, x: Tensor) -> Tensor:
        """[B, q, d] -> [B, q, d]."""
        mlp = self.mlp
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) * self.mask)


def build_ffn(mlp: Any, index: Tensor) -> SlicedFFN | MaskedFFN:
    """The decode FFN for neuron sets ``index`` [B, k]; sliced when every row (one sample, or its beams) agrees."""
    if index.shape[0] == 1 or bool((index == index[:1]).all()):
        return SlicedFFN(mlp, index[0])
    return MaskedFFN(mlp, index)
