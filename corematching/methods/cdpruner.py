"""CDPruner: keep visual tokens that are relevant to the instruction and unlike each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from corematching.errors import UserError
from corematching.methods.base import Geometry, Keep, Method, Stage, VisionOutput
from corematching.methods.parameters import Budget, check_budget, check_count, count_of
from corematching.methods.views import VisionView


@dataclass(frozen=True)
class CDPruner(Method):
    """CDPruner (NeurIPS 2025, arXiv 2506.10967; repository Theia-4869/CDPruner).

    Greedy maximum-a-posteriori selection of a determinantal point process over the projected tokens. Its kernel is the
    tokens' cosine similarity, scaled on both sides by their relevance: *minus* the cosine between the patch's CLIP
    embedding and the instruction's, mean over the instruction's 77-token segments, scaled to (0, 1]. So, as in the
    official code, the patches least similar to the text by that embedding count as the most relevant. Kept tokens go on
    in raster order with consecutive position ids.

    Patch embeddings are ``visual_projection(post_layernorm(features))``. The instruction is the text after the last
    image, without the closing role marker. Reading it moves the prompt's ids to the host once per prefill.

    Differences from the official code: relevance is scaled per image (officially over the whole batch); picks beyond
    the kernel's rank fall to the largest remaining gain instead of a division by the root of a non-positive number. The
    paper's weight theta is commented out in the official code and is left out here.

    Parameters
    ----------
    keep
        Visual tokens to keep per image (count, or truncated fraction); met exactly.
    text_model
        Path or hub id of the CLIP model whose vision tower the model uses: its text tower and projections are needed.
        Models whose tower is no CLIP's with a text side cannot run this method.
    """

    keep: Budget
    text_model: str | None
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)

    def stages(self, geometry: Geometry) -> list[Stage]:
        check_count("keep", self.keep, geometry.image_tokens)
        if self.keep == 1.0 or self.keep == geometry.image_tokens:
            return []
        if self.text_model is None and geometry.image_tokens is not None:  # others refuse it with any
            raise UserError(
                "text_model=None is not valid for cdpruner: give the CLIP model (path or hub id) whose vision tower "
                "this model has, such as openai/clip-vit-large-patch14-336; models without one cannot run it"
            )
        return [VisionOutput(self.select, question=True, renumber=True, text_model=self.text_model or "")]

    def select(self, view: VisionView) -> Keep:
        assert self.text_model is not None
        images, patches = view.features.shape[:2]
        keep = count_of(self.keep, patches)
        embeds, texts = view.clip_embeddings(self.text_model)
        direction = torch.stack([F.normalize(text, dim=-1).mean(0) for text in texts])
        picks = determinantal_picks(view.projected, relevance(embeds, direction), keep)
        view.spend(2 * patches**2 * view.projected.shape[2] + 2 * keep**2 / 2 * patches)
        return Keep(torch.zeros_like(view.features[..., 0], dtype=torch.bool).scatter(1, picks, True), [keep] * images)


def relevance(embeds: Tensor, direction: Tensor) -> Tensor:
    """Relevance of patches to a text, least similar = 1.

    Parameters
    ----------
    embeds
        [N, P, c] CLIP embeddings of the patches, not normalised.
    direction
        [N, c] mean of the unit embeddings of the text's segments.

    Returns
    -------
    [N, P] in (0, 1].
    """
    score = -(F.normalize(embeds.float(), dim=-1) @ direction.float()[..., None])[..., 0]
    low, high = score.amin(1, keepdim=True), score.amax(1, keepdim=True)
    return (score - low + 1e-6) / (high - low)


def determinantal_picks(tokens: Tensor, weights: Tensor, keep: int) -> Tensor:
    """Fast greedy MAP of the determinantal point process with kernel ``w_i cos(x_i, x_j) w_j``.

    Parameters
    ----------
    tokens
        [N, P, d].
    weights
        [N, P].
    keep
        Tokens to pick. One pick depends on all before, so the loop runs over picks (all images at once).

    Returns
    -------
    Long [N, keep] in the order of picking.
    """
    unit = F.normalize(tokens.float(), dim=-1) * weights.float()[..., None]
    kernel = unit @ unit.transpose(1, 2)
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    factors = kernel.new_zeros(len(kernel), keep, kernel.shape[2])
    picks: list[Tensor] = []
    for step in range(keep):
        pick = gain.argmax(1, keepdim=True)
        picks.append(pick)
        wide = pick[..., None].expand(-1, -1, kernel.shape[2])
        known = factors[:, :step]
        row = kernel.gather(1, wide)[:, 0] - (known.gather(2, pick[..., None].expand(-1, step, 1)) * known).sum(1)
        best = gain.gather(1, pick)
        # Beyond the kernel's rank nothing is left to explain: gains stay as they are.
        factors[:, step] = torch.where(best > 1e-9, row / best.clamp(min=1e-9).sqrt(), 0.0)
        gain = (gain - factors[:, step].square()).scatter(1, torch.cat(picks, 1), -torch.inf)
    return torch.cat(picks, 1)
