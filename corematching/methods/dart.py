"""DART: keep a few pivots and the visual tokens that duplicate them least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from corematching.errors import UserError
from corematching.methods.base import BeforeLayer, Geometry, Keep, Method, Stage
from corematching.methods.parameters import Budget, check_budget, check_count, place
from corematching.methods.selection import tokens_at
from corematching.methods.views import LayerView


@dataclass(frozen=True)
class DART(Method):
    """DART (EMNLP 2025, arXiv 2502.11494; checked against the re-implementation in ModelTC/llmc).

    Once in prefill, at the input of ``layer``: pivots are the visual tokens, and the text tokens after the image, whose
    keys of layer ``layer - 1`` have the largest L1 norm. Each pivot adds the ``floor(keep / pivots)`` visual tokens
    that are least similar to it (cosine of hidden states under the decoder's final norm) and not taken yet. Kept tokens
    keep their order and position ids.

    As in the reference, image pivots come on top of the budget and the division rounds down, so
    ``image_pivots + floor(keep / pivots) * pivots`` tokens are kept: 132 for ``keep=128`` and 4 + 4 pivots.

    Differences from the reference: it walks through the pivots in the iteration order of a CPython set, which changes
    some 10 of 132 tokens; here the order is stable: image pivots, then text pivots, each by decreasing norm. Text
    pivots come from after the last image; a prompt with fewer text tokens there has fewer pivots.

    Parameters
    ----------
    keep
        Budget of visual tokens per sample (count or fraction) shared among the pivots, see above.
    image_pivots, text_pivots
        Pivots of either kind; at least one image pivot.
    layer
        Layers 0..layer-1 see all tokens.
    depth_fraction
        Gives ``layer`` as a fraction of the model's depth instead.
    """

    keep: Budget
    image_pivots: int
    text_pivots: int
    layer: int
    depth_fraction: float | None
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)
        for name, value, least in (("image_pivots", self.image_pivots, 1), ("text_pivots", self.text_pivots, 0)):
            if value < least:
                raise UserError(f"{name}={value!r} is not valid: give a count >= {least}")

    def stages(self, geometry: Geometry) -> list[Stage]:
        check_count("keep", self.keep, geometry.image_tokens)
        check_count("image_pivots", self.image_pivots, geometry.image_tokens)
        return [BeforeLayer(place(self.layer, self.depth_fraction, geometry.depth, first=1), self.select)]

    def select(self, view: LayerView) -> Keep | None:
        text = [min(self.text_pivots, tokens) for tokens in view.prompt.question_lengths]
        shares = [self.share(count, own) for count, own in zip(view.visual_counts, text, strict=True)]
        kept = [
            min(count, self.image_pivots + share * (self.image_pivots + own))
            for count, share, own in zip(view.visual_counts, shares, text, strict=True)
        ]
        if kept == view.visual_counts:
            return None
        with view.charging([keep < count for keep, count in zip(kept, view.visual_counts, strict=True)]):
            return Keep(self.choose(view, text, shares) & view.visual_valid, kept)

    def choose(self, view: LayerView, text: list[int], shares: list[int]) -> Tensor:
        """Bool [B, V]: pivots and what they add, ``shares[b]`` tokens each; sample b has ``text[b]`` text pivots."""
        device = view.hidden.device
        norms = key_norms(view.queries_keys(view.layer - 1)[1])
        index = torch.arange(norms.shape[1], device=device)
        asked = index >= norms.shape[1] - torch.tensor(view.prompt.question_lengths, device=device)[:, None]
        image = largest(view.gather(norms), view.visual_valid, self.image_pivots)
        words = largest(norms, asked, self.text_pivots)
        states = view.normed()
        visual = view.gather(states)
        pivots = torch.cat([tokens_at(visual, image), tokens_at(states, words)], 1)
        numbers = zip(view.visual_counts, text, strict=True)
        view.spend([2 * (min(self.image_pivots, count) + own) * count * visual.shape[2] for count, own in numbers])
        taken = torch.zeros_like(view.visual_valid).scatter(1, image, True) | ~view.visual_valid
        order = torch.arange(pivots.shape[1], device=device)
        real = order < self.image_pivots + torch.tensor(text, device=device)[:, None]
        return add_dissimilar(visual, pivots, taken, torch.tensor(shares, device=device)[:, None] * real)

    def share(self, tokens: int, text_pivots: int) -> int:
        """How many of ``tokens`` visual tokens each pivot adds."""
        budget = self.keep if isinstance(self.keep, int) else self.keep * tokens
        return tokens if budget >= tokens else int(budget // (self.image_pivots + text_pivots))


def key_norms(keys: Tensor) -> Tensor:
    """L1 norm of each token's keys, all heads together: [B, H, n, hd] -> [B, n]."""
    return keys.abs().float().sum((1, 3))


def largest(norms: Tensor, eligible: Tensor, count: int) -> Tensor:
    """Long [B, count]: the eligible tokens of largest norm, in decreasing order."""
    return norms.masked_fill(~eligible, -torch.inf).topk(min(count, norms.shape[1]), dim=1).indices


def add_dissimilar(states: Tensor, pivots: Tensor, taken: Tensor, share: Tensor) -> Tensor:
    """Let every pivot in turn take the tokens least similar to it.

    Parameters
    ----------
    states
        [B, V, d] visual tokens.
    pivots
        [B, R, d] pivots in the order of their turns.
    taken
        Bool [B, V] tokens out of the game: pivots and padded slots.
    share
        Long, [B, R] or [B, 1]: tokens each pivot takes, as long as there are any.

    Returns
    -------
    Bool [B, V]: ``taken`` and what the pivots took.
    """
    similarity = F.normalize(pivots.float(), dim=-1) @ F.normalize(states.float(), dim=-1).transpose(1, 2)
    share = share.expand(-1, pivots.shape[1])
    index = torch.arange(states.shape[1], device=states.device).expand_as(taken)
    for turn in range(pivots.shape[1]):
        order = similarity[:, turn].masked_fill(taken, torch.inf).argsort(dim=1, stable=True)
        rank = torch.empty_like(order).scatter_(1, order, index)
        taken = taken | (rank < share[:, turn, None])
    return taken
