"""FFNs that read chosen neurons where they lie, core neurons without sorting, and when they can be used.

Triton is imported only where a GPU uses it.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from corematching.kernels import cpu_core, cpu_ffn, native

_ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "ReLU": "relu"}
CACHED_BYTES = 2**23
"""FFNs up to this size sit in a CPU's last-level cache, where copied rows are as good."""


@cache
def available(device: torch.device) -> bool:
    """Whether there are kernels for a device: a CPU, or a GPU from Volta on (Triton's oldest) with Triton installed."""
    if device.type == "cuda":
        return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)
    return device.type == "cpu"


def activation_of(mlp: Any) -> str | None:
    """The Triton kernels' name of an FFN's activation function, None if they do not know it."""
    return _ACTIVATIONS.get(type(mlp.act_fn).__name__)


def usable(mlp: Any, x: Tensor, way: str = "in_place") -> bool:
    """Whether this call can read chosen neurons in place: one token (natively a few), and an FFN that is covered."""
    tokens = x.numel() // x.shape[-1]
    return tokens <= (native.MOST_TOKENS if way == "native" else 1) and covers(mlp, way)


def covers(mlp: Any, way: str = "in_place") -> bool:
    """Whether an FFN's neurons can be read in place that way: no biases, neuron-major, and what its device can compute.

    On a GPU that is a known activation; on a CPU an FFN too big for the cache, natively in float32 and bfloat16, by
    torch's operators in float32.
    """
    weight = mlp.gate_proj.weight
    if any(linear.bias is not None for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        return False
    if not mlp.down_proj.weight.t().is_contiguous():
        return False
    if weight.device.type != "cpu":
        return way == "in_place" and available(weight.device) and activation_of(mlp) is not None
    if fits_cache(mlp):
        return False
    if way == "native":
        return native.usable(weight)
    return weight.dtype in cpu_ffn.DTYPES and cpu_ffn.trusted(torch.get_num_threads())


def ways(mlp: Any) -> tuple[str, ...]:
    """The ways in which an FFN's neurons can be read in place here: "native", "in_place", both or none."""
    return tuple(way for way in ("native", "in_place") if covers(mlp, way))


def fits_cache(mlp: Any) -> bool:
    """Whether an FFN sits in a CPU's cache."""
    weight = mlp.gate_proj.weight
    return weight.device.type == "cpu" and 3 * weight.numel() * weight.element_size() <= CACHED_BYTES


def chosen_ffn(mlp: Any, index: Tensor, x: Tensor, way: str = "in_place", chosen: Tensor | None = None) -> Tensor:
    """The FFN of one token, [1, 1, d] -> [1, 1, d], reading only the rows of the neurons ``index`` (long [k]).

    Parameters
    ----------
    way
        One of :func:`ways`; "native" takes a few tokens at once, [..., d].
    chosen
        Natively: bool [tokens, k], which of the neurons each token has; None: all.
    """
    weights = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.t()
    if way == "native":
        return native.chosen_ffn(*weights, index, x, mlp.act_fn, chosen)
    if x.device.type == "cpu":
        return cpu_ffn.chosen_ffn(*weights, index, x, mlp.act_fn)
    from corematching.kernels.gpu_ffn import chosen_ffn as launch

    activation = activation_of(mlp)
    assert activation is not None
    with torch.cuda.device(x.device):
        return launch(*weights, index, x, activation)


def core_neurons(activations: Tensor, valid: Tensor, rho: float, count: int) -> Tensor:
    """:func:`corematching.methods.core.core_neurons`; on a GPU in two launches, without synchronising."""
    if activations.device.type == "cpu":
        return cpu_core.core_neurons(activations, valid, rho, count)
    from corematching.kernels.gpu_core import core_neurons as launch

    with torch.cuda.device(activations.device):
        return launch(activations, valid, rho, count)
