"""Training the thresholds of ``as_vit`` in a frozen tower: see :class:`corematching.methods.as_vit.ASViT`.

The tower runs with all its tokens; those below a threshold are taken out of every softmax by a policy of zeros and
ones, whose gradient is that of a steep sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from corematching.cost.shapes import vision_layer_flops
from corematching.methods.as_vit import class_scores
from corematching.training.language import Packer
from corematching.training.reading import attend_by_policy
from corematching.training.selection import answer_losses, answers, ask, straight_through

TEMPERATURE = 0.5
"""Of the sigmoid over logarithms of scores."""
LEAST = 1e-12
"""Added to scores and thresholds before their logarithm: where [CLS] does not look at all, a score is 0."""
FIRST_KEEP = 0.7
"""Share of the patches that each place keeps of those before it when training begins."""
FLOPS_WEIGHT = 9.2
"""Official: 2.0 per GFLOP of a tower of 4.6 GFLOPs. Here on the share of the dense tower's."""
DISTILL_WEIGHT = 0.5


class Thresholds(nn.Module):
    """What is trained: the logarithm of one threshold for each place where patches leave."""

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.tensor(values).clamp(min=LEAST).log())

    @property
    def values(self) -> list[float]:
        return self.logs.detach().exp().tolist()


@dataclass(frozen=True)
class PolicyRun:
    """A pass of the tower: projected features (n, P, width), policy (n, P), share of the dense FLOPs, mean counts."""

    projected: Tensor
    policy: Tensor
    flops: Tensor
    kept: list[float]


def run_tower(
    model: Any, pixels: Tensor, layers: Sequence[int], leave: Callable[[int, Tensor], Tensor] | None = None
) -> PolicyRun:
    """Run tower and projector of a LLaVA; patches may leave before the blocks `layers`.

    `leave` gets the number of the place and the patches' scores (n, P) and returns their policy, which those that left
    before can only keep; None: nothing leaves.
    """
    tower = model.model.vision_tower
    config = model.config.vision_config
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    n, length = hidden.shape[:2]
    policy = hidden.new_ones(n, length - 1)
    scores = policy
    blocks = tower.encoder.layers
    flops, dense = hidden.new_zeros(()), 0.0
    kept, wanted = [], model.config.vision_feature_layer % (len(blocks) + 1)
    features = hidden
    for index, block in enumerate(blocks):
        if leave is not None and index in layers:
            # Who left stays away; why they left is a matter of the threshold they met, so no gradient here.
            policy = policy.detach() * leave(layers.index(index), scores)
            kept.append(policy.sum(1).mean().item())
        hidden, scores = _block(block, hidden, nn.functional.pad(policy, (1, 0), value=1.0))
        tokens = policy.sum(1) + 1
        cost = vision_layer_flops(config.hidden_size, config.intermediate_size, tokens, tokens, tokens)  # type: ignore[arg-type]
        flops = flops + cost.mean()  # type: ignore[attr-defined]
        dense += vision_layer_flops(config.hidden_size, config.intermediate_size, length, length, length)
        features = hidden if index + 1 == wanted else features
    return PolicyRun(model.model.multi_modal_projector(features[:, 1:]), policy, flops / dense, kept)


def above(logs: Tensor, place: int, scores: Tensor) -> Tensor:
    """Policy (n, P) of the patches whose score is above a place's threshold, given as a logarithm."""
    soft = (((scores + LEAST).log() - (logs[place].exp() + LEAST).log()) / TEMPERATURE).sigmoid()
    return straight_through((soft > 0.5).float(), soft)


@torch.no_grad()
def first_thresholds(model: Any, pixels: Tensor, layers: Sequence[int], keep: float = FIRST_KEEP) -> list[float]:
    """Thresholds above which every place keeps a share `keep` of the patches that are left, over all pictures."""
    found: list[float] = []
    left = torch.ones((), dtype=torch.bool)

    def leave(place: int, scores: Tensor) -> Tensor:
        nonlocal left
        left = left.expand_as(scores)
        found.append(scores[left].quantile(1 - keep).item() if left.any() else 0.0)
        left = left & (scores > found[-1])
        return left.float()

    run_tower(model, pixels, layers, leave)
    return found


@torch.no_grad()
def untrained_thresholds(model: Any, pixels: Tensor, layers: Sequence[int], tokens: float) -> list[float]:
    """The control of trained thresholds: every place keeps one share, chosen so that ``tokens`` come out on average.

    The shares are of all pictures' patches together, so that pictures still differ.
    """
    low, high = 0.0, 1.0
    for _ in range(8):
        keep = (low + high) / 2
        thresholds = first_thresholds(model, pixels, layers, keep)
        low, high = (keep, high) if kept(model, pixels, layers, thresholds) < tokens else (low, keep)
    return thresholds


@torch.no_grad()
def kept(model: Any, pixels: Tensor, layers: Sequence[int], thresholds: Sequence[float]) -> float:
    """Patches left of a picture at the end of the tower, on average."""
    logs = torch.tensor(thresholds).log()
    return run_tower(model, pixels, layers, partial(above, logs)).policy.sum(1).mean().item()


def _block(block: Any, hidden: Tensor, policy: Tensor) -> tuple[Tensor, Tensor]:
    """One tower block under a policy (n, T), and the patches' scores (n, T - 1)."""
    attn = block.self_attn
    normed = block.layer_norm1(hidden)
    query, key, value = (
        projection(normed).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
        for projection in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    itself = torch.eye(policy.shape[1], device=policy.device)
    weights = policy[:, None, None] + (1 - policy[:, None, None]) * itself
    heads = attend_by_policy(query, key, value, None, weights)
    logits = (query[:, :, :1] @ key.transpose(2, 3)).float() * attn.head_dim**-0.5
    seen = logits.masked_fill(policy[:, None, None] == 0, -torch.inf).softmax(-1)[:, :, 0, 1:]
    hidden = hidden + attn.out_proj(heads.transpose(1, 2).flatten(2))
    return hidden + block.mlp(block.layer_norm2(hidden)), class_scores(seen, heads[:, :, 1:].norm(dim=-1))


@dataclass(frozen=True)
class ThresholdStage:
    """A stage for :class:`corematching.training.loop.Track`; the model that it trains is :class:`Thresholds`."""

    name: str
    steps: int
    llava: Any
    packer: Packer
    layers: tuple[int, ...]
    target: float
    seed: int = 0
    scenes: int = 3
    rate_peak: float = 0.05

    def start(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(model.parameters(), lr=self.rate_peak, weight_decay=0.0)]

    def rate(self, step: int) -> float:
        """Cosine from 1 to 0.1, as the official schedule goes from 2e-5 to 2e-6."""
        return 0.1 + 0.45 * (1 + math.cos(math.pi * step / self.steps))

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        asked = ask(self.packer, self.seed, step, self.scenes)
        with torch.no_grad():
            whole = run_tower(self.llava, asked.pixels, self.layers)
            teacher, targets = answers(self.llava, asked.batch, whole.projected)
        assert isinstance(model, Thresholds)
        run = run_tower(self.llava, asked.pixels, self.layers, partial(above, model.logs))
        logits, _ = answers(self.llava, asked.batch, run.projected, run.policy)
        cross_entropy, divergence, right = answer_losses(logits, teacher, targets)
        kept = run.policy.detach() > 0
        tokens = nn.functional.kl_div(
            run.projected[kept].log_softmax(-1),
            whole.projected[kept].log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )
        loss = cross_entropy + FLOPS_WEIGHT * (run.flops - self.target).abs() + DISTILL_WEIGHT * (divergence + tokens)
        scores = {"ce": cross_entropy.item(), "right": right, "flops": run.flops.item()}
        return loss, scores | {f"kept{layer}": count for layer, count in zip(self.layers, run.kept)}
