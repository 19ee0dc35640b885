"""Density-peak clustering of tokens, as pure tensor functions."""

from __future__ import annotations

import torch
from torch import Tensor


def density_peak_clusters(tokens: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """DPC-KNN: centres are tokens that are dense and far from anything denser.

    Distances are Euclidean over sqrt(d). A token's density is exp(-mean squared distance to its ``clusters`` nearest
    tokens, itself included); its centre score is the density times the distance to the nearest denser token (for the
    densest: the largest distance there is). Source: SparseVLM (arXiv 2410.04417), section on token recycling.

    Equal densities, certain for one or two clusters, are told apart by order: the earlier token counts as denser. (The
    official code adds random noise of 1e-6 instead, which makes results depend on the generator's state.)

    Parameters
    ----------
    tokens
        [B, N, d].
    clusters
        How many, at most N.

    Returns
    -------
    centres
        Long [B, clusters], in descending order of centre score.
    assignment
        Long [B, N], values in 0..clusters-1; centres belong to themselves.
    """
    count = tokens.shape[1]
    distance = torch.cdist(tokens.float(), tokens.float(), compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance / tokens.shape[2] ** 0.5
    nearest = distance.topk(clusters, dim=2, largest=False).values
    density = (-nearest.square().mean(2)).exp()
    density = density + torch.linspace(1e-6, 0, count, device=tokens.device)

    denser = density[:, None, :] > density[:, :, None]
    farthest = distance.amax((1, 2), keepdim=True)
    separation = torch.where(denser, distance, farthest).amin(2)
    centres = (separation * density).topk(clusters, dim=1).indices

    to_centres = distance.gather(1, centres[..., None].expand(-1, -1, count))
    assignment = to_centres.argmin(1)
    order = torch.arange(clusters, device=tokens.device).expand_as(centres)
    return centres, assignment.scatter(1, centres, order)


def cluster_means(tokens: Tensor, assignment: Tensor, clusters: int) -> Tensor:
    """Mean token of every cluster: [B, N, d], long [B, N] -> [B, clusters, d]."""
    member = torch.nn.functional.one_hot(assignment, clusters).to(tokens.dtype)
    sums = member.transpose(1, 2) @ tokens
    return sums / (member.sum(1)[..., None] + 1e-6)
