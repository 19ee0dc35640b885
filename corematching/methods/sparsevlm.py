"""SparseVLM: text tokens that care about the image rate its tokens; what is pruned is partly recycled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corematching.errors import UserError
from corematching.methods.base import BeforeLayer, Geometry, Keep, Method, Replace, Stage
from corematching.methods.clustering import cluster_means, density_peak_clusters
from corematching.methods.parameters import (
    Budget,
    check_budget,
    check_choice,
    check_count,
    check_falling,
    check_layer,
    count_of,
)
from corematching.methods.selection import tokens_at, top_mask
from corematching.methods.views import LayerView, PromptView

SCHEDULES = {
    "1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
"""Tokens kept after each pruning layer, by version and nominal budget (an average over the layers)."""
RANK_TOLERANCE = 1e-5
"""Singular values below this share of the largest do not count towards a rank (single precision)."""


@dataclass(frozen=True)
class SparseVLM(Method):
    """SparseVLM (ICML 2025, arXiv 2410.04417; repository Gumpest/SparseVLMs).

    Question tokens whose embedding matches the visual tokens better than average are *raters*, chosen once before
    layer 0. At the output of every layer in ``layers``, visual tokens are scored by the raters' mean attention in that
    layer and all but the layer's count of ``schedule`` leave.

    Version "1.5" averages all heads, then recycles: the best 30 % (plus one) of the pruned tokens are clustered, one
    cluster per ten tokens (plus one), and each cluster's mean goes on as a new token between the kept visual tokens
    and the question. Remaining tokens get new position ids 0..n-1. Version "2.0" (SparseVLM+) divides attention by
    what rotary positions alone would give, averages the ``priority_heads`` heads with the largest corrected attention
    only, recycles nothing and keeps position ids.

    Difference from the paper: counts come from fixed lists, as in the official code. ``schedule="rank"`` is the paper's
    rule instead: of n visual tokens, ``rank_scale * (n - rank)`` leave, with the rank of the raters' attention to them.
    The kept number is then **adaptive**. Differences from the official code: ties in the clustering are broken by order
    instead of random noise; a layer whose count is not below what is there prunes nothing (the official code always
    drops one token); without any rater, all question tokens rate; question tokens are those after the last image.

    Parameters
    ----------
    version
        "1.5" or "2.0".
    keep
        Nominal budget with an official list: 192, 128, 96 or 64 (an average over 32 layers, not a count at any layer).
    schedule
        Tokens kept after each of ``layers`` instead (counts, or fractions of the original number); recycled tokens
        come on top. "rank" makes the counts adaptive (version "1.5").
    layers
        Decoder layers whose output is pruned.
    priority_heads
        Heads that count in version 2.0; the official code has 14 whatever the model.
    rank_scale
        Share of the redundant tokens (more than the rank) that leave with ``schedule="rank"``, in (0, 1].
    """

    version: str | float
    keep: int
    schedule: tuple[Budget, ...] | str | None
    layers: tuple[int, ...]
    priority_heads: int
    rank_scale: float
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", str(self.version))
        check_choice("version", str(self.version), tuple(SCHEDULES))
        if not self.layers:
            raise UserError("layers=[] is not valid: give the layers at whose output tokens leave")
        check_budget("rank_scale", self.rank_scale, fraction_only=True)
        if self.priority_heads < 1:
            raise UserError(f"priority_heads={self.priority_heads} is not valid: give a count of at least 1")
        if self.schedule is None:
            if self.keep not in SCHEDULES[str(self.version)]:
                valid = ", ".join(map(str, SCHEDULES[str(self.version)]))
                raise UserError(f"keep={self.keep!r} is not valid: give {valid}, or a schedule of one count per layer")
        elif isinstance(self.schedule, str):
            check_choice("schedule", self.schedule, ("rank",))
            if self.version != "1.5":
                raise UserError(f"schedule='rank' is not valid with version={self.version}: it belongs to 1.5")
        elif len(self.schedule) != len(self.layers):
            raise UserError(
                f"schedule={list(self.schedule)} is not valid: give one entry for each of layers={list(self.layers)}"
            )
        for budget in self.budgets:
            if budget is not None:
                check_budget("schedule", budget)

    @property
    def budgets(self) -> tuple[Budget | None, ...]:
        """Tokens kept after each pruning layer; None = adaptive."""
        if isinstance(self.schedule, str):
            return (None,) * len(self.layers)
        return SCHEDULES[str(self.version)][self.keep] if self.schedule is None else self.schedule

    def stages(self, geometry: Geometry) -> list[Stage]:
        if len(self.budgets) != len(self.layers):
            raise UserError(
                f"layers={list(self.layers)} is not valid: keep={self.keep} needs {len(self.budgets)} layers"
            )
        if self.version == "2.0" and not 1 <= self.priority_heads <= geometry.heads:
            raise UserError(f"priority_heads={self.priority_heads} is not valid: give 1 to {geometry.heads}")
        if isinstance(self.schedule, tuple):
            check_falling("schedule", self.schedule, geometry.image_tokens)
        stages: list[BeforeLayer] = []
        for layer, budget in zip(self.layers, self.budgets, strict=True):
            check_layer("layers", layer, geometry.depth - 1, first=stages[-1].layer if stages else 0)
            if self.schedule is not None and budget is not None:
                check_count("schedule", budget, geometry.image_tokens)
            stages.append(BeforeLayer(layer + 1, _Pruning(self, budget), renumber=self.version == "1.5"))
        first = self.budgets[0]
        if self.schedule is None and first is not None and (geometry.image_tokens or first) < first:
            raise UserError(
                f"keep={self.keep} keeps {first} tokens at first, an image of this model has "
                f"{geometry.image_tokens}: give a schedule"
            )
        return list(stages)

    def kept_counts(self, view: LayerView, budget: Budget | None) -> list[int]:
        """Visual tokens to keep per sample."""
        if budget is not None:
            return [
                min(now, count_of(budget, total))
                for now, total in zip(view.visual_counts, view.prompt.image_counts, strict=True)
            ]
        book_raters(view, [count > 0 for count in view.visual_counts])
        raters, weights, counts = rater_rows(view)
        relation = view.attention(view.layer - 1, raters, counts).mean(1)
        real = (weights > 0)[..., None] & view.visual_valid[:, None]
        relation = relation.gather(2, view.visual[:, None].expand(-1, relation.shape[1], -1)) * real
        view.spend([2 * own**2 * now for own, now in zip(counts, view.visual_counts, strict=True)])
        ranks = torch.linalg.matrix_rank(relation, rtol=RANK_TOLERANCE).tolist()
        return [
            now - int(self.rank_scale * max(now - rank, 0)) for now, rank in zip(view.visual_counts, ranks, strict=True)
        ]

    def scores(self, view: LayerView) -> Tensor:
        """[B, V], higher = keep."""
        raters, weights, counts = rater_rows(view)
        attention = view.attention(view.layer - 1, raters, counts)
        if self.version == "1.5":
            return view.gather((attention.mean(1) * weights[..., None]).sum(1))
        attention = attention / view.position_kernel(view.layer - 1, raters, counts)[:, None]
        # The raters' mean first, then visual columns: [B, H, V].
        per_head = (attention * weights[:, None, :, None]).sum(2)
        visual = view.visual[:, None].expand(-1, per_head.shape[1], -1)
        per_head = per_head.gather(2, visual) * view.visual_valid[:, None]
        heads = per_head.sum(2).topk(self.priority_heads, dim=1).indices
        return per_head.gather(1, heads[..., None].expand(-1, -1, per_head.shape[2])).mean(1)


@dataclass(frozen=True)
class _Pruning:
    """What happens at one pruning layer."""

    method: SparseVLM
    budget: Budget | None

    def __call__(self, view: LayerView) -> Keep | Replace | None:
        wanted = self.method.kept_counts(view, self.budget)
        if wanted == view.visual_counts:
            return None
        acting = [want < now for want, now in zip(wanted, view.visual_counts, strict=True)]
        book_raters(view, acting)
        with view.charging(acting):
            scores = self.method.scores(view)
            kept = Keep(top_mask(scores, view.visual_valid, wanted), wanted)
            return kept if self.method.version == "2.0" else recycle(view, scores, kept)


def rater_rows(view: LayerView) -> tuple[Tensor, Tensor, list[int]]:
    """The raters as rows of the layer's sequence (long [B, R]), their weights ([B, R], sum 1) and number per sample.

    Raters depend on the prompt alone, so they are found once per prefill.
    """
    notes = view.prompt.notes
    if "sparsevlm raters" not in notes:
        notes["sparsevlm raters"] = _find_raters(view.prompt)
    from_end, weights, counts = notes["sparsevlm raters"]
    return view.hidden.shape[1] - from_end, weights, counts


def book_raters(view: LayerView, acting: list[bool]) -> None:
    """Book what finding the raters costs, on each sample when its first tokens leave."""
    prompt, width = view.prompt, view.prompt.embeds.shape[2]
    paid = prompt.notes.setdefault("sparsevlm paid", set())
    costs = [2 * n * max(1, q) * width for n, q in zip(prompt.lengths, prompt.question_lengths, strict=True)]
    view.spend([cost if now and row not in paid else 0 for row, (cost, now) in enumerate(zip(costs, acting))])
    paid.update(row for row, now in enumerate(acting) if now)


def _find_raters(prompt: PromptView) -> tuple[Tensor, Tensor, list[int]]:
    """Raters as distances from the sequence's end (long [B, R], 1 = last token), their weights and number."""
    longest = max(1, *prompt.question_lengths)
    lengths = torch.tensor(prompt.question_lengths, device=prompt.valid.device)[:, None]
    question = torch.arange(longest, 0, -1, device=prompt.valid.device) <= lengths.clamp(min=1)
    visual = prompt.visual_mask.float()[..., None]
    logits = prompt.embeds @ prompt.embeds[:, -longest:].transpose(1, 2)
    match = logits.float().masked_fill(~question[:, None], -torch.inf).softmax(2)
    scores = (match * visual).sum(1) / visual.sum(1).clamp(min=1)
    mean = scores.sum(1, keepdim=True) / question.sum(1, keepdim=True)
    chosen = (scores > mean) & question
    chosen = torch.where(chosen.any(1, keepdim=True), chosen, question)
    counts = chosen.sum(1).tolist()
    index = (~chosen).to(torch.int8).argsort(dim=1, stable=True)[:, : max(counts)]
    weights = chosen.gather(1, index).float()
    return longest - index, weights / weights.sum(1, keepdim=True), counts


def recycle(view: LayerView, scores: Tensor, kept: Keep) -> Replace:
    """Kept tokens, then the means of clusters of the best pruned ones, per sample."""
    assert kept.counts is not None
    states = view.gather(view.hidden)
    cuts = list(zip(view.visual_counts, kept.counts, strict=True))
    recycled = [recycled_counts(now - keep) for now, keep in cuts]
    counts = [keep + clusters for (_, keep), (_, clusters) in zip(cuts, recycled, strict=True)]
    origin = view.visual.new_full((len(cuts), max(counts)), -1)
    slot = torch.zeros_like(origin)
    plans = []
    for cut in sorted(set(cuts)):
        # Samples with the same counts go together; usually that is the whole batch.
        rows = torch.tensor([row for row, own in enumerate(cuts) if own == cut], device=states.device)
        plan = _Recycling.of(rows, cut, states, scores, kept.mask)
        plans.append(plan)
        origin[rows, : cut[1]] = plan.index
        slot[rows, : cut[1]] = plan.index
        slot[rows, cut[1] : cut[1] + plan.clusters] = cut[0] - 1
    view.spend([2 * members * clusters * states.shape[2] for members, clusters in recycled])

    def mix(values: Tensor) -> Tensor:
        mixed = values.new_zeros(*origin.shape, values.shape[2])
        for plan in plans:
            own = plan.combine(values)
            mixed[plan.rows, : own.shape[1]] = own
        return mixed

    return Replace(mix(states), origin, slot, counts, mix)


def recycled_counts(pruned: int) -> tuple[int, int]:
    """How many of ``pruned`` tokens are recycled, and into how many clusters."""
    recycled = int(0.3 * pruned) + 1 if pruned else 0
    return recycled, recycled // 10 + 1 if recycled else 0


@dataclass(frozen=True)
class _Recycling:
    """How samples that keep equally many of equally many tokens recycle: kept tokens, then clusters of pruned ones."""

    rows: Tensor
    """Long [B']: the samples."""
    index: Tensor
    """Long [B', keep]: slots of kept tokens."""
    best: Tensor
    """Long [B', recycled]: slots of the best pruned ones."""
    assignment: Tensor
    """Long [B', recycled]: the cluster of each."""
    clusters: int

    @classmethod
    def of(cls, rows: Tensor, cut: tuple[int, int], states: Tensor, scores: Tensor, kept: Tensor) -> _Recycling:
        """Cluster the pruned tokens of [B, V, d], of which ``kept`` (bool [B, V]) stay."""
        now, keep = cut
        recycled, clusters = recycled_counts(now - keep)
        mask = kept[rows, :now]
        index = (~mask).to(torch.int8).argsort(dim=1, stable=True)[:, :keep]
        best = scores[rows, :now].float().masked_fill(mask, -torch.inf).topk(recycled, dim=1).indices
        members = tokens_at(states[rows], best)
        assignment = density_peak_clusters(members, clusters)[1] if clusters else best
        return cls(rows, index, best, assignment, clusters)

    def combine(self, values: Tensor) -> Tensor:
        """Per-token rows [B, V, c] of the samples as their tokens are combined, [B', keep + clusters, c]."""
        own = values[self.rows]
        kept = tokens_at(own, self.index)
        if not self.clusters:
            return kept
        return torch.cat([kept, cluster_means(tokens_at(own, self.best), self.assignment, self.clusters)], 1)
