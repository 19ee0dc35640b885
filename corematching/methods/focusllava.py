"""FocusLLaVA: a router gives every region of the image its own scale, then text thins the tokens inside the LLM."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, max_pool2d

from corematching.errors import UserError
from corematching.methods.base import BeforeLayer, Geometry, Keep, Method, Replace, Stage, VisionOutput
from corematching.methods.parameters import check_budget, check_layer
from corematching.methods.selection import keep_top, tokens_at
from corematching.methods.stored import stored
from corematching.methods.views import LayerView, VisionView
from corematching.registry import file_of

REGION = 4
"""Patches on a side of a region."""
POOLED = (4, 2, 1)
"""Patches on a side that a token of each scale stands for: 1, 4 and 16 tokens per region."""
TOKENS = tuple((REGION // side) ** 2 for side in POOLED)


@dataclass(frozen=True)
class FocusLLaVA(Method):
    """FocusLLaVA (arXiv 2411.14228; no official code found).

    The *vision-guided sampler* cuts the feature map into regions of 4 x 4 patches and offers each at three scales: the
    maximum over 4 x 4, 2 x 2 or 1 x 1 patches, that is 1, 4 or 16 tokens. A trained router picks the scale, so detail
    is spent where there is some. The *text-guided sampler* drops visual tokens at a layer in the middle of the LLM:
    what the text behind the image attends to stays.

    Verified from abstract and reviews: the two samplers and their places, regions, the three poolings, a router with an
    auxiliary balance loss, ranking by attention from text. Ours, because no source says it: the size of a region; the
    router, one linear map of a region's mean feature and of its maximum above the mean, both normalised; the single
    best scale, with no gate on the features (the LLM is not trained along, and would meet features of another length);
    a budget on the mean count of tokens in place of the balance loss; attention in the layer before, averaged over
    heads and all tokens behind the image. A pooled token takes the position of its lower right middle patch, by which
    the trace lists it. The paper trains the whole model with a stochastic technique; here the router alone is trained
    (``scripts/train_selection.py focusllava``).

    Parameters
    ----------
    router
        File of the router's weights; "packaged:NAME" for one that comes with the package, and null for none, which is
        refused.
    layer
        Decoder layer at whose input the text-guided sampler drops tokens.
    keep
        Fraction of the visual tokens that entered the LLM and stay there; 1.0 leaves the sampler out. How many entered
        is the router's decision.
    """

    router: str | None
    layer: int
    keep: float
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep, fraction_only=True)

    def stages(self, geometry: Geometry) -> list[Stage]:
        side = math.isqrt(geometry.image_tokens or 0)
        if side**2 != geometry.image_tokens or side % REGION:
            raise UserError(f"focusllava cuts images into regions of {REGION} x {REGION}: {side} patches do not divide")
        weights = load_router(self.router)
        stages: list[Stage] = [VisionOutput(functools.partial(self.scale, weights))]
        if self.keep < 1:
            layer = check_layer("layer", self.layer, geometry.depth, first=1)
            stages.append(BeforeLayer(layer, self.thin))
        return stages

    @staticmethod
    def scale(weights: Tensor, view: VisionView) -> Replace | None:
        """Every region at the scale that the router gives most."""
        features = view.features
        rows = columns = math.isqrt(features.shape[1])
        summary = region_summary(regions(features, rows, columns))
        if summary.shape[-1] + 1 != weights.shape[1]:
            raise UserError(
                f"this router is for a tower of width {(weights.shape[1] - 1) // 2}, the model's has "
                f"{features.shape[-1]}: train one with scripts/train_selection.py focusllava"
            )
        view.spend(2 * summary[0].numel() * len(weights))
        chosen = route(summary, weights.to(summary)).argmax(-1)
        if bool((chosen == len(POOLED) - 1).all()):
            return None
        tokens, patch, scale = candidates(features, rows, columns)
        region = region_of(patch, columns)
        wanted = chosen[:, region] == scale
        counts = wanted.sum(1).tolist()
        index = (~wanted).to(torch.int8).argsort(dim=1, stable=True)[:, : max(counts)]
        hidden = tokens_at(tokens, index)
        return Replace(hidden, patch[index], counts=counts)

    def thin(self, view: LayerView) -> Keep:
        """Keep what the text behind the image attends to."""
        asking = view.prompt.question_lengths
        length = view.valid.shape[1]
        rows = torch.arange(length - max(asking), length, device=view.hidden.device).expand(len(asking), -1)
        attention = view.attention(view.layer - 1, rows, asking).mean(1)
        own = rows >= length - torch.tensor(asking, device=rows.device)[:, None]
        received = (attention * own[..., None]).sum(1)
        return keep_top(view.gather(received), self.keep, view.visual_valid, view.visual_counts)


def regions(features: Tensor, rows: int, columns: int) -> Tensor:
    """[N, P, d] patches in raster order -> [N, regions in raster order, 16, d]."""
    grid = features.unflatten(1, (rows // REGION, REGION, columns // REGION, REGION))
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def region_summary(parts: Tensor) -> Tensor:
    """What the router sees of regions [..., 16, d]: mean and maximum above it, normalised each, [..., 2 d]."""
    mean = parts.float().mean(-2)
    above = parts.float().amax(-2) - mean
    width = mean.shape[-1:]
    return torch.cat([layer_norm(mean, width), layer_norm(above, width)], -1)


def route(summary: Tensor, weights: Tensor) -> Tensor:
    """Scores [..., 3] of the scales from summaries [..., 2 d] and weights [3, 2 d + 1], the last of them biases."""
    return summary @ weights[:, :-1].T + weights[:, -1]


def region_of(patch: Tensor, columns: int) -> Tensor:
    """Number of the region that each patch lies in."""
    return patch // columns // REGION * (columns // REGION) + patch % columns // REGION


def candidates(features: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """All regions at all scales, ordered by place.

    Returns
    -------
    Tokens [N, C, d], and for each the patch whose place it takes and its scale (long [C]).
    """
    images = features.transpose(1, 2).unflatten(2, (rows, columns))
    tokens, patches, scales = [], [], []
    for scale, side in enumerate(POOLED):
        tokens.append(max_pool2d(images, side).flatten(2).transpose(1, 2))
        row = torch.arange(rows // side, device=features.device) * side + side // 2
        column = torch.arange(columns // side, device=features.device) * side + side // 2
        patches.append((row[:, None] * columns + column).flatten())
        scales.append(torch.full_like(patches[-1], scale))
    patch, order = torch.cat(patches).sort(stable=True)
    return torch.cat(tokens, 1)[:, order], patch, torch.cat(scales)[order]


def load_router(path: str | None) -> Tensor:
    """Weights [3, 2 d + 1] of a router.

    Raises
    ------
    UserError
        If there is no such file (says how to make one) or it holds something else.
    """
    if path is None:
        raise UserError("router=None: focusllava needs a router; train one with scripts/train_selection.py focusllava")
    try:
        weights = stored(file_of(path), "router")
        if not isinstance(weights, Tensor) or weights.dim() != 2 or len(weights) != len(POOLED):
            raise ValueError("no matrix of a row per scale")
    except ValueError as error:
        raise UserError(
            f"router={path!r} is no router that can be read: train one with scripts/train_selection.py focusllava"
        ) from error
    return weights.float()
