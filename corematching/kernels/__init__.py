"""The GPU kernels, and when they can be used. Triton is imported only then."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "ReLU": "relu"}


@cache
def available(device: torch.device) -> bool:
    """Whether kernels can run on a device: CUDA with Triton installed."""
    return device.type == "cuda" and find_spec("triton") is not None


def activation_of(mlp: Any) -> str | None:
    """The kernels' name of an FFN's activation function, None if they do not know it."""
    return _ACTIVATIONS.get(type(mlp.act_fn).__name__)


def usable(mlp: Any, x: Tensor) -> bool:
    """Whether the gathering FFN kernel can compute this call: on a GPU, for one token."""
    return available(x.device) and x.numel() == x.shape[-1] and covers(mlp)


def covers(mlp: Any) -> bool:
    """Whether the gathering FFN kernel knows such an FFN: no biases, a known activation, neuron-major."""
    return (
        activation_of(mlp) is not None
        and all(linear.bias is None for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        and mlp.down_proj.weight.t().is_contiguous()
    )


def gather_ffn(mlp: Any, index: Tensor, x: Tensor) -> Tensor:
    """The FFN of one token, [1, 1, d] -> [1, 1, d], reading only the rows of the neurons ``index`` (long [k])."""
    from corematching.kernels.gather import gather_ffn as launch

    activation = activation_of(mlp)
    assert activation is not None
    with torch.cuda.device(x.device):
        return launch(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.t(), index, x, activation)


def core_neurons(activations: Tensor, valid: Tensor, rho: float, count: int) -> Tensor:
    """:func:`corematching.methods.core.core_neurons` in two launches, without synchronising."""
    from corematching.kernels.core import core_neurons as launch

    with torch.cuda.device(activations.device):
        return launch(activations, valid, rho, count)
