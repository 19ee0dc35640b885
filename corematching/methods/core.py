"""Core neurons and core tokens as pure tensor functions (CoreMatching, arXiv 2505.19235, section 3).

An FFN activation of a token is ``a = act(x W_gate) * (x W_up)``; a neuron is activated when its entry is positive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corematching import kernels
from corematching.kernels.counts import core_counts

VOTERS = ("all", "text", "last")
"""Who may vote for the sentence's core neurons: see :func:`voting`."""


def core_neurons(activations: Tensor, valid: Tensor, rho: float, count: int) -> Tensor:
    """Sentence-wise core neurons of the tokens' own core neurons.

    Parameters
    ----------
    activations
        [B, n, I].
    valid
        Bool [B, n].
    rho, count
        As in :func:`token_core_neurons` and :func:`sentence_core_neurons`, whose composition this is; kernels do it
        without sorting.

    Returns
    -------
    Long [B, count], ascending.
    """
    if kernels.available(activations.device):
        return kernels.core_neurons(activations, valid, rho, count)
    return sentence_core_neurons(token_core_neurons(activations, rho), valid, count)


def voting(valid: Tensor, visual: Tensor, voters: str) -> Tensor:
    """Which tokens vote for the sentence's core neurons: "all", those of the "text", or the "last" one; bool [B, n].

    Parameters
    ----------
    valid, visual
        Bool [B, n]: tokens that are no padding (which stands on the left), and visual tokens.
    """
    if voters == "text":
        return valid & ~visual
    if voters == "last":
        return valid & (torch.arange(valid.shape[1], device=valid.device) == valid.shape[1] - 1)
    return valid


def token_core_neurons(activations: Tensor, rho: float) -> Tensor:
    """Token-wise core neurons: activations within the top ``rho`` of the token's positive ones.

    A token with P positive activations keeps the max(1, floor(rho * P)) largest; activations equal to the smallest
    kept one are kept too.

    Parameters
    ----------
    activations
        [..., I].
    rho
        Fraction in (0, 1].

    Returns
    -------
    Bool [..., I].
    """
    total = (activations > 0).sum(-1, keepdim=True)
    counts = core_counts(activations.shape[-1], rho, activations.device)
    wanted = counts[total].long()
    most = int(core_counts(activations.shape[-1], rho, torch.device("cpu"))[-1])
    threshold = activations.topk(most, dim=-1).values.gather(-1, wanted - 1)
    # A token without positive activations has no core neurons: its threshold is not positive, so nothing may reach it.
    return activations >= threshold.masked_fill(total == 0, torch.inf)


def sentence_core_neurons(token_core: Tensor, valid: Tensor, count: int) -> Tensor:
    """Sentence-wise core neurons: the ``count`` neurons that most tokens hold as core; ties go to the lower index.

    Parameters
    ----------
    token_core
        Bool [B, n, I].
    valid
        Bool [B, n].

    Returns
    -------
    Long [B, count], ascending.
    """
    votes = (valid.float()[:, None] @ token_core.float())[:, 0]
    order = votes.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return order.sort(dim=-1).values


def match_counts(activations: Tensor, core: Tensor) -> Tensor:
    """How many of the sentence's core neurons each token activates.

    Parameters
    ----------
    activations
        [B, V, I].
    core
        Long [B, k].

    Returns
    -------
    [B, V], exact integers in float32.
    """
    held = torch.zeros(activations.shape[0], activations.shape[-1], 1, device=activations.device)
    held.scatter_(1, core[..., None], 1.0)
    return ((activations > 0).float() @ held)[..., 0]


def coactivation_counts(activations: Tensor, reference: Tensor) -> Tensor:
    """How many neurons each token activates together with a reference token: [B, V, I], [B, I] -> [B, V]."""
    return ((activations > 0).float() @ (reference > 0).float()[..., None])[..., 0]
