"""What trained token selection has in common: questions about training scenes, and a frozen model that answers them.

Only the selector is trained. The frozen model with all visual tokens is the teacher, the same model with the tokens
that the selector leaves is the student; both answer packed questions (see :mod:`corematching.training.language`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corematching.benchmarks.mini.scenes import GRID, make_scene
from corematching.training.language import Mix, Packer, pixels_of
from corematching.training.reading import IGNORED, PackedBatch, run_layers

QUESTIONS = Mix({"gqa": 4, "vqav2": 2, "textvqa": 1, "pope": 1, "mme": 1, "mmbench": 1})
PER_SCENE = 6
FIRST_SCENE = 40_000_000
"""Seeds of the training scenes lie beyond it: apart from those of the calibration prompts."""


@dataclass(frozen=True)
class Asked:
    """One step's pictures (n, 3, 336, 336) and the questions about them, packed behind their visual tokens."""

    pixels: Tensor
    batch: PackedBatch


def ask(packer: Packer, seed: int, step: int, scenes: int, places: Tensor | None = None) -> Asked:
    """The scenes and questions of a training step: a pure function of seed and step.

    ``places`` (long [visual]): raster index of each visual token; None = those of the 576 patches.
    """
    rng = random.Random(f"selection:{seed}:{step}")
    first = FIRST_SCENE + (seed * 1_000_000 + step) * scenes
    drawn = [make_scene(first + number, "train") for number in range(scenes)]
    questions = [[QUESTIONS.draw(scene, rng) for _ in range(PER_SCENE)] for scene in drawn]
    index = (torch.arange(GRID * GRID) if places is None else places).expand(scenes, -1)
    return Asked(pixels_of(drawn), packer.pack(drawn, index, questions, rng))


def answers(model: Any, batch: PackedBatch, visual: Tensor, policy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits of the answer tokens (m, vocabulary), and the right ones (m); `policy` as in `run_layers`."""
    _, last = run_layers(model, batch, visual, policy=policy)
    chosen = batch.targets != IGNORED
    return model.lm_head(model.model.language_model.norm(last[chosen])), batch.targets[chosen]


def answer_losses(logits: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, float]:
    """Cross entropy, divergence from the teacher's answers, and the share of right answer tokens."""
    divergence = nn.functional.kl_div(
        logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    right = (logits.argmax(-1) == targets).float().mean().item()
    return nn.functional.cross_entropy(logits, targets), divergence, right


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The values of `hard` with the gradient of `soft`."""
    return hard - soft.detach() + soft


def frozen(model: Any) -> Any:
    """The model without gradients of its own."""
    return model.requires_grad_(False).eval()
