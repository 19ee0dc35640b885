"""A budget for every image: what ranks over a whole prompt inside the LLM, done image by image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from corematching.errors import UserError
from corematching.methods.base import BeforeLayer, Geometry, Guide, Keep, Method, Replace, Stage
from corematching.methods.composed import Composed
from corematching.methods.parameters import spread
from corematching.methods.selection import tokens_at
from corematching.methods.views import LayerView

Sizes = tuple[int, ...]
"""Visual tokens of each of a prompt's images."""
BUDGETS = ("keep", "keeps", "schedule")
"""Parameters that say how many visual tokens of a prompt stay."""


@dataclass(frozen=True)
class PerImage(Method):
    """A token method that chooses at a decoder layer, asked about one image at a time.

    Such methods rank all visual tokens of a prompt together, so that with several images one may lose almost all of
    its tokens. Here every image keeps its share: counts are spread in proportion to the images' tokens (where images
    have equally many, what does not divide goes to the first ones), fractions are of each image, adaptive budgets adapt
    to each. Prompts with one image are left to the method. Signals are computed once per image, and cost
    that much.

    Parameters
    ----------
    method
        The method; its name and parameters stay visible, with ``per_image: true`` added.

    Raises
    ------
    UserError
        When placed on a model, if the method does not choose at a decoder layer; while running, if a count is smaller
        than the number of images.
    """

    method: Method

    @property
    def acts_on(self) -> frozenset[str]:  # type: ignore[override]
        return self.method.acts_on

    @property
    def parameters(self) -> dict[str, Any]:
        return {**self.method.parameters, "per_image": True}

    def stages(self, geometry: Geometry) -> list[Stage]:
        stages = list(self.method.stages(geometry))
        if not any(isinstance(stage, BeforeLayer | Guide) for stage in stages):
            raise UserError(
                f"per_image=True is not valid for {self.method.name}: it is for methods that choose among a prompt's "
                "visual tokens inside the LLM; vision-side methods treat images one by one anyway"
            )
        return [self._split(number, stage, geometry) for number, stage in enumerate(stages)]

    def _split(self, number: int, stage: Stage, geometry: Geometry) -> Stage:
        def of(sizes: Sizes, image: int, name: str) -> Callable:
            """The same stage's function under an image's share of the budget."""
            return getattr(list(self._share(sizes, image).stages(geometry))[number], name)

        if isinstance(stage, BeforeLayer):
            return replace(stage, select=lambda view: self._decide(view, stage.select, of))
        if isinstance(stage, Guide):

            def ranked(name: str) -> Callable:
                def select(scores: Tensor, view: LayerView) -> Any:
                    whole = getattr(stage, name)
                    return self._decide(
                        view,
                        lambda view: whole(scores, view),
                        lambda sizes, image, _: _on_scores(of(sizes, image, name), scores),
                    )

                return select

            return replace(stage, select=ranked("select"), rescore=ranked("rescore"))
        return stage

    def _share(self, sizes: Sizes, image: int) -> Method:
        """The method with one image's share of every count among its budgets."""
        shares = {
            field.name: _shared(field.name, getattr(self.method, field.name), sizes, image)
            for field in fields(self.method)  # type: ignore[arg-type]
            if field.name in BUDGETS
        }
        return replace(self.method, **shares)  # type: ignore[type-var]

    def _decide(
        self, view: LayerView, whole: Callable[[LayerView], Any], of: Callable[[Sizes, int, str], Callable]
    ) -> Keep | Replace | None:
        sizes = [tuple(image.count for image in own) for own in view.prompt.images]
        if max(map(len, sizes)) < 2:
            return whole(view)
        owner = view.fact("image")
        parts = []
        for alike in sorted({own for own in sizes if own}):
            rows = torch.tensor([own == alike for own in sizes], device=owner.device)[:, None]
            for image, tokens in enumerate(alike):
                part = _OneImage(view, (owner == image) & rows & view.visual_valid, image, tokens)
                with view.charging([count > 0 for count in part.visual_counts]):
                    parts.append((part, of(alike, image, "select")(part)))
        return _joined(view, parts)


def of_each_image(method: Method, geometry: Geometry) -> Method:
    """The method; where it chooses inside the LLM and its budget is a fraction, it is asked image by image.

    So a fraction is a share of each image's own tokens. Counts are the prompt's, unless ``per_image`` spreads them;
    methods without a budget adapt to the prompt.
    """
    if isinstance(method, Composed):
        return Composed(of_each_image(method.first, geometry), of_each_image(method.second, geometry))
    budget = next((own for name in BUDGETS[::-1] if (own := getattr(method, name, None)) is not None), None)
    parts = budget if isinstance(budget, tuple | list) else [budget]
    inside = any(isinstance(stage, BeforeLayer | Guide) for stage in method.stages(geometry))
    return PerImage(method) if inside and all(isinstance(part, float) for part in parts) else method


def _shared(name: str, budget: Any, sizes: Sizes, image: int) -> Any:
    """A budget's share for one of several images; what is no count stays as it is."""
    if isinstance(budget, tuple | list):
        return tuple(_shared(name, own, sizes, image) for own in budget)
    if isinstance(budget, bool) or not isinstance(budget, int):
        return budget
    if budget < len(sizes):
        raise UserError(f"{name}={budget} cannot be shared by {len(sizes)} images: give at least one token for each")
    return spread(budget, sizes)[image]


def _on_scores(select: Callable, scores: Tensor) -> Callable[[_OneImage], Any]:
    return lambda part: select(scores.gather(1, part.index), part)


class _OneImage:
    """A :class:`~corematching.methods.views.LayerView` of which one image of each sample can be chosen from.

    ``visual_mask`` stays that of all images: what is no text does not become it.
    """

    def __init__(self, view: LayerView, mask: Tensor, image: int, tokens: int) -> None:
        self._view = view
        self.visual_counts = mask.sum(1).tolist()
        self.index = (~mask).to(torch.int8).argsort(dim=1, stable=True)[:, : max(1, *self.visual_counts)]
        """Long [B, V']: the image's slots among all visual ones."""
        self.visual = view.visual.gather(1, self.index)
        self.visual_valid = mask.gather(1, self.index)
        self.origin = view.origin.gather(1, self.index)
        self.prompt = _OfOneImage(view.prompt, image, [tokens if count else 0 for count in self.visual_counts])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)

    def fact(self, name: str) -> Tensor:
        return self._view.fact(name).gather(1, self.index)

    def gather(self, values: Tensor) -> Tensor:
        return values.gather(1, self.visual) if values.dim() == 2 else tokens_at(values, self.visual)


class _OfOneImage:
    """A prompt view that counts one image's tokens."""

    def __init__(self, prompt: Any, image: int, image_counts: list[int]) -> None:
        self._prompt, self.image_counts = prompt, image_counts
        self.images = [
            own[image : image + 1] if count else [] for own, count in zip(prompt.images, image_counts, strict=True)
        ]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._prompt, name)


def _joined(view: LayerView, parts: list[tuple[_OneImage, Any]]) -> Keep | Replace | None:
    """One decision about all images."""
    if all(decision is None for _, decision in parts):
        return None
    if not any(isinstance(decision, Replace) for _, decision in parts):
        kept = torch.zeros_like(view.visual_valid, dtype=torch.int8)
        for part, decision in parts:
            mask = part.visual_valid if decision is None else decision.mask & part.visual_valid
            kept.scatter_add_(1, part.index, mask.to(torch.int8))
        return Keep(kept > 0)
    replaced = [_as_replace(part, decision) for part, decision in parts]
    hidden, origin, slot, real = (torch.cat(columns, 1) for columns in zip(*replaced, strict=True))
    # Real tokens first, in the images' order.
    order = (~real).to(torch.int8).argsort(dim=1, stable=True)
    counts = real.sum(1).tolist()
    order = order[:, : max(counts)]

    def mix(rows: Tensor) -> Tensor:
        return tokens_at(torch.cat([_mixed(part, decision, rows) for part, decision in parts], 1), order)

    known = all(not isinstance(decision, Replace) or decision.mix is not None for _, decision in parts)
    return Replace(
        tokens_at(hidden, order), origin.gather(1, order), slot.gather(1, order), counts, mix if known else None
    )


def _mixed(part: _OneImage, decision: Keep | Replace | None, rows: Tensor) -> Tensor:
    """Per-token rows of all images, as one image's tokens were combined."""
    own = tokens_at(rows, part.index)
    if not isinstance(decision, Replace):
        return own
    assert decision.mix is not None
    return decision.mix(own)


def _as_replace(part: _OneImage, decision: Keep | Replace | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, origins and slots among all visual tokens, and which are real: all [B, K] (tokens [B, K, d])."""
    if not isinstance(decision, Replace):
        mask = part.visual_valid if decision is None else decision.mask & part.visual_valid
        return part.gather(part.hidden), part.index, part.index, mask
    origin, slot = decision.origin, decision.origin if decision.slot is None else decision.slot
    place = part.index.gather(1, slot.clamp(min=0))
    source = part.index.gather(1, origin.clamp(min=0)).masked_fill(origin < 0, -1)
    counts = decision.counts or [origin.shape[1]] * len(origin)
    own = torch.tensor([c if n else 0 for c, n in zip(counts, part.visual_counts, strict=True)], device=origin.device)
    real = torch.arange(origin.shape[1], device=origin.device) < own[:, None]
    return decision.hidden, source, place, real
