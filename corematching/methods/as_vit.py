"""Adaptive Sparse ViT: patches whose class attention is below a learned threshold leave inside the tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corematching.errors import UserError
from corematching.methods.base import Geometry, Keep, Method, Stage, VisionDrop
from corematching.methods.parameters import check_layer
from corematching.methods.views import TowerView


@dataclass(frozen=True)
class ASViT(Method):
    """Adaptive Sparse ViT (IJCAI 2023, arXiv 2209.13802; repository Cydia2018/AS-ViT).

    Before some blocks of the vision tower, patches leave whose score in the block before is not above that place's
    threshold. The score is the attention that [CLS] pays a patch, every head weighted by its share of the patch's
    output (:func:`class_scores`). Thresholds are learned, so every image keeps as many patches as it needs; later
    blocks, the projector and the LLM see only these, at their own positions.

    Differences from the official code: it is a classifier's method, its use in front of an LLM is this package's; runs
    on CLIP instead of DeiT. In a batch, every image keeps its own patches (officially, images of a batch share the mean
    count), and at least its best one. There is no exact budget: the thresholds are the budget.

    Differences in training (``scripts/train_selection.py``), which officially takes 30 epochs of ImageNet: only the
    thresholds are trained, tower and LLM stay as they are (officially the backbone follows at a small rate); they are
    trained as logarithms with a sigmoid of temperature 0.5 (officially as they are, with 1e-4), since the bundled
    tower's scores span five powers of ten; they start where each place keeps 70 % (officially at 0.001, 0.002, 0.003);
    the task is answering questions about the image, so the loss of the tokens dropped is seen through the LLM; the rate
    is 0.05 on logarithms, falling to a tenth by the same cosine. Losses and their weights are the official ones: cross
    entropy, 2.0 per GFLOP of DeiT-S away from the target (9.2 on the share of the tower's FLOPs), half the divergence
    of answers and of the kept tokens from the dense model's.

    Parameters
    ----------
    layers
        Blocks of the tower (0-based) before which patches leave. Officially 3, 6 and 9 of 12.
    thresholds
        One for each of ``layers``. Scores of a patch lie in [0, 1]; at 0 only patches that [CLS] cannot see at all
        leave, below 0 none. The defaults are where official training starts; the bundled model's trained ones are in
        its ``conf/model`` file.
    """

    layers: tuple[int, ...]
    thresholds: tuple[float, ...]
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.thresholds):
            raise UserError(
                f"thresholds={list(self.thresholds)} is not valid: give one for each of layers={list(self.layers)}"
            )
        if list(self.layers) != sorted(set(self.layers)):
            raise UserError(f"layers={list(self.layers)} is not valid: give them in ascending order, each once")
        for threshold in self.thresholds:
            if threshold >= 1:
                raise UserError(f"thresholds={list(self.thresholds)} is not valid: scores are at most 1, give less")

    def stages(self, geometry: Geometry) -> list[Stage]:
        for layer in self.layers:
            check_layer("layers", layer, geometry.vision_score_layer + 1, first=1)
        if all(threshold < 0 for threshold in self.thresholds):
            return []
        return [VisionDrop(self.layers, self.select)]

    def select(self, view: TowerView) -> Keep:
        scores = class_scores(view.cls_attention(), view.head_norms()).masked_fill(~view.valid, -torch.inf)
        threshold = self.thresholds[self.layers.index(view.layer)]
        return Keep((scores > threshold) | (scores == scores.amax(1, keepdim=True)))


def class_scores(attention: Tensor, norms: Tensor) -> Tensor:
    """Class attention, every head weighted by its share of a token's output.

    Parameters
    ----------
    attention
        [..., H, P] attention of [CLS] to the patches.
    norms
        [..., H, P] length of every head's output at those patches.

    Returns
    -------
    [..., P].
    """
    return (attention * norms / (norms.sum(-2, keepdim=True) + 1e-8)).sum(-2)
