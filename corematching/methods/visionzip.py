"""VisionZip: dominant patches, and the rest merged into a few contextual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from corematching.errors import UserError
from corematching.methods.base import Geometry, Method, Replace, Stage, VisionOutput
from corematching.methods.parameters import Budget, check_budget, check_count, count_of
from corematching.methods.selection import tokens_at
from corematching.methods.views import VisionView


@dataclass(frozen=True)
class VisionZip(Method):
    """VisionZip (CVPR 2025, arXiv 2412.04467; repository dvlab-research/VisionZip).

    Dominant tokens: [CLS] and the ``dominant - 1`` patches it looks at most in the tower layer whose output becomes
    the features (heads summed). Contextual tokens: of the remaining patches, evenly strided ones become targets; every
    other one is assigned to its most similar target (keys of that layer, mean over heads, cosine); a contextual token
    is the target plus the mean of what was assigned to it. The LLM gets [CLS], dominant patches ascending, then
    contextual tokens, with consecutive position ids.

    The official count includes [CLS], which plain LLaVA drops: ``dominant=54, contextual=10`` are 64 tokens. If the
    counts add up to all patches or more, nothing is reduced and the model is dense (without [CLS]). In the trace,
    dominant patches are listed by index, [CLS] and contextual tokens (sums) as -1.

    Differences from the official code: none known. The paper calls the contextual tokens averages; the official code
    adds the mean to the target, and so does this.

    Parameters
    ----------
    dominant
        Dominant tokens per image, [CLS] included.
    contextual
        Contextual tokens per image; 0 leaves them out.
    keep
        Both in one (count or fraction of the patches), split as the official settings are: 54 + 10 of 64 tokens,
        108 + 20 of 128, 162 + 30 of 192. None takes ``dominant`` and ``contextual``.
    """

    dominant: int
    contextual: int
    keep: Budget | None
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        for name, value, least in (("dominant", self.dominant, 1), ("contextual", self.contextual, 0)):
            if value < least:
                raise UserError(f"{name}={value!r} is not valid: give a count >= {least}")
        if self.keep is not None:
            check_budget("keep", self.keep)

    def split(self, patches: int) -> tuple[int, int]:
        """Dominant and contextual tokens of an image of so many patches."""
        if self.keep is None:
            return self.dominant, self.contextual
        total = count_of(self.keep, patches)
        contextual = round(total * 10 / 64)
        return total - contextual, contextual

    def stages(self, geometry: Geometry) -> list[Stage]:
        patches, layer = geometry.image_tokens, geometry.vision_score_layer
        if patches is not None:
            if self.keep is not None:
                check_count("keep", self.keep, patches)
            dominant, contextual = self.split(patches)
            total = dominant + contextual
            if total > patches + 1:
                raise UserError(
                    f"dominant={dominant} and contextual={contextual} are {total} tokens, more than the "
                    f"{patches} patches of an image and [CLS]: give at most {patches + 1} in all"
                )
            if total >= patches:
                return []

        def select(view: VisionView) -> Replace:
            patches = view.features.shape[1]
            dominant, contextual = self.split(patches)
            scores = view.cls_attention(layer).sum(1)
            hidden = torch.cat([view.cls[:, None], view.features], 1)
            tokens, patch = zip_tokens(hidden, scores, view.keys(layer).mean(2), dominant, contextual)
            view.spend(2 * (patches + 1 - dominant) * contextual * view.keys(layer).shape[-1])
            origin = patch.masked_fill(torch.arange(patch.shape[1], device=patch.device) >= dominant, -1)
            return Replace(tokens, origin, slot=torch.zeros_like(origin))

        return [VisionOutput(select, renumber=True)]


def zip_tokens(hidden: Tensor, scores: Tensor, metric: Tensor, dominant: int, contextual: int) -> tuple[Tensor, Tensor]:
    """Dominant and contextual tokens.

    Parameters
    ----------
    hidden
        [N, P + 1, d_v], [CLS] first.
    scores
        [N, P] how much [CLS] looks at each patch.
    metric
        [N, P + 1, C] similarity metric, not normalised.
    dominant, contextual
        Counts as in :class:`VisionZip`, together fewer than P + 1.

    Returns
    -------
    Tokens [N, dominant + contextual, d_v] in the official order, and for each its patch (long; -1 for [CLS], the target
    for contextual tokens).
    """
    images, length = hidden.shape[:2]
    top = scores.topk(dominant - 1, dim=1).indices + 1
    is_dominant = torch.zeros_like(hidden[..., 0], dtype=torch.int8).scatter(1, top, 1)
    is_dominant[:, 0] = 1
    order = is_dominant.argsort(dim=1, descending=True, stable=True)
    first, rest = order[:, :dominant], order[:, dominant:]
    if contextual == 0:
        return tokens_at(hidden, first), first - 1
    stride = max(1, rest.shape[1] // contextual)
    # The places are the same for every image and known on the host: a boolean index there costs no synchronisation.
    is_target = torch.zeros(length - dominant, dtype=torch.bool)
    is_target[::stride][:contextual] = True
    target, other = (rest[:, chosen.nonzero()[:, 0].to(rest.device)] for chosen in (is_target, ~is_target))
    unit = F.normalize(metric.float(), dim=-1)
    assigned = (tokens_at(unit, other) @ tokens_at(unit, target).transpose(1, 2)).argmax(2)
    sums = unit.new_zeros(images, contextual, hidden.shape[2])
    sums = sums.scatter_add(1, assigned[..., None].expand(-1, -1, hidden.shape[2]), tokens_at(hidden, other).float())
    counts = unit.new_zeros(images, contextual).scatter_add(1, assigned, torch.ones_like(assigned, dtype=unit.dtype))
    merged = tokens_at(hidden, target) + (sums / counts.clamp(min=1)[..., None]).to(hidden.dtype)
    return torch.cat([tokens_at(hidden, first), merged], 1), torch.cat([first, target], 1) - 1
