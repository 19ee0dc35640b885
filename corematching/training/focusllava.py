"""Training the router of ``focusllava``: see :class:`corematching.methods.focusllava.FocusLLaVA`.

Text sees every region at all three scales at once, under a policy that is one for the scale the router gives most and
zero for the others, with the gradient of the router's softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corematching.benchmarks.mini.scenes import GRID
from corematching.methods.focusllava import POOLED, TOKENS, candidates, region_of, region_summary, regions, route
from corematching.training.language import Packer
from corematching.training.loop import Schedule
from corematching.training.selection import answer_losses, answers, ask, straight_through
from corematching.training.vision import tower_features

BUDGET_WEIGHT = 10.0
DISTILL_WEIGHT = 0.5


class Router(nn.Module):
    """What is trained: [3, 2 d + 1] for a tower of width d."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(len(POOLED), 2 * width + 1, generator=generator) * (2 * width) ** -0.5
        self.weights = nn.Parameter(drawn * 0.3)


@dataclass(frozen=True)
class RouterStage:
    """A stage for :class:`corematching.training.loop.Track`; the model that it trains is :class:`Router`.

    ``target`` is the share of the patches that go on as tokens, on average.
    """

    name: str
    steps: int
    llava: Any
    packer: Packer
    target: float
    seed: int = 0
    scenes: int = 3
    rate_peak: float = 0.01

    def start(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(model.parameters(), lr=self.rate_peak, weight_decay=0.0)]

    def rate(self, step: int) -> float:
        return Schedule(self.steps, warmup=10, decay_share=0.5)(step)

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        assert isinstance(model, Router)
        asked = ask(self.packer, self.seed, step, self.scenes)
        with torch.no_grad():
            features = tower_features(self.llava, asked.pixels)[:, 1:]
            teacher, targets = answers(self.llava, asked.batch, self.llava.model.multi_modal_projector(features))
            tokens, patch, scale = candidates(features, GRID, GRID)
            visual = self.llava.model.multi_modal_projector(tokens)
            summary = region_summary(regions(features, GRID, GRID))
        soft = route(summary, model.weights).softmax(-1)
        gate = straight_through(nn.functional.one_hot(soft.argmax(-1), len(POOLED)).float(), soft)
        policy = gate[:, region_of(patch, GRID), scale]
        # The questions are those of the teacher, behind other visual tokens.
        batch = ask(self.packer, self.seed, step, self.scenes, patch).batch
        logits, _ = answers(self.llava, batch, visual, policy)
        cross_entropy, divergence, right = answer_losses(logits, teacher, targets)
        share = (gate * torch.tensor(TOKENS)).sum(-1).mean() / TOKENS[-1]
        loss = cross_entropy + DISTILL_WEIGHT * divergence + BUDGET_WEIGHT * (share - self.target).abs()
        scores = {"ce": cross_entropy.item(), "right": right, "tokens": GRID * GRID * share.item()}
        return loss, scores | {f"x{count}": gate[..., place].mean().item() for place, count in enumerate(TOKENS)}
