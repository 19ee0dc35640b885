"""SGL: a small model answers first and tells the large one which visual tokens matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from corematching.errors import UserError
from corematching.methods.base import Geometry, Guide, Keep, Method, Stage
from corematching.methods.parameters import Budget, check_budget, check_choice, check_count, check_layer
from corematching.methods.selection import keep_top
from corematching.methods.views import LayerView

EXIT_SCORES = ("mean", "confidence", "consistency")
OBSERVERS = ("last_visual", "after_image")


@dataclass(frozen=True)
class SGL(Method):
    """Small VLM guides large VLM (SGL, CVPR 2025, arXiv 2412.03324; repository NUS-HPC-AI-Lab/SGL).

    A small model with the same visual tokens answers the prompt greedily. The attention its visual tokens receive,
    from the positions of the prompt that follow and from every token of the answer, is summed over layers and heads. As
    in the official code the first of these positions is the last visual token itself; ``observers="after_image"``
    starts after it. At the input of layer ``int(depth * layer_fraction)`` the large model drops all but the top
    ``keep`` tokens by this score; kept ones keep order and position ids.

    The official scripts always run the large model (``early_exit=None``) and write down two scores of the small model's
    answer: its *confidence*, the geometric mean of its token probabilities (the length-normalised product), and its
    *consistency*, the product of the probabilities that the small model gives to the same answer when only the top
    ``consistency_keep`` of its visual tokens enter its layer 0. With ``early_exit``, the small model's answer is final
    where ``exit_score`` reaches the threshold, and the large model never runs: "mean" fuses the two with equal weights,
    "confidence" and "consistency" take one of them. The fusion is not in the official scripts.

    The small model's full cost is counted in the trace, which also holds both scores. Efficiency rows do not call
    ``generate``: they time and count its reading of the prompt, not its answer.

    Differences from the official code: batches (samples exit one by one; prompts without an image are not guided); the
    pass for the consistency runs only where early exit asks for it; called without ``generate``, the small model only
    reads the prompt, since there is no answer to wait for.

    Parameters
    ----------
    guide
        The small model: a ``conf/model`` name, local path or hub id. It must share visual grid and tokenizer.
    layer_fraction
        Where tokens leave, as a fraction of the large model's depth (truncated to a layer).
    keep
        Visual tokens to keep per sample (count, or fraction truncated as in the official code).
    early_exit
        Score from which the small model's answer is final, in (0, 1]; None = never.
    exit_score
        "mean", "confidence" or "consistency".
    consistency_keep
        Visual tokens of the small model when it scores its answer again (official default 0.05); None = ``keep``.
    observers
        "last_visual": the prompt's positions from the last visual token on. "after_image": without that token.
    """

    guide: str
    layer_fraction: float
    keep: Budget
    early_exit: float | None
    exit_score: str
    consistency_keep: Budget | None
    observers: str
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)
        if not 0 <= self.layer_fraction < 1:
            raise UserError(f"layer_fraction={self.layer_fraction} is not valid: give a fraction in [0, 1)")
        if self.early_exit is not None and not 0 < self.early_exit <= 1:
            raise UserError(
                f"early_exit={self.early_exit} is not valid: give a confidence in (0, 1], or null for never"
            )

        check_choice("exit_score", self.exit_score, EXIT_SCORES)
        check_choice("observers", self.observers, OBSERVERS)
        if self.consistency_keep is not None:
            check_budget("consistency_keep", self.consistency_keep)

    def stages(self, geometry: Geometry) -> list[Stage]:
        check_count("keep", self.keep, geometry.image_tokens)
        layer = check_layer("layer_fraction", int(geometry.depth * self.layer_fraction), geometry.depth)
        if self.consistency_keep is not None:
            check_count("consistency_keep", self.consistency_keep, geometry.image_tokens)
        return [
            Guide(
                self.guide,
                layer,
                self.select,
                self.rescore,
                self.early_exit,
                self.exit_score,
                after_image=self.observers == "after_image",
            )
        ]

    def select(self, scores: Tensor, view: LayerView) -> Keep:
        return keep_top(scores, self.keep, view.visual_valid, view.visual_counts)

    def rescore(self, scores: Tensor, view: LayerView) -> Keep:
        """What the small model keeps of its own visual tokens to score its answer again."""
        keep = self.keep if self.consistency_keep is None else self.consistency_keep
        return keep_top(scores, keep, view.visual_valid, view.visual_counts)
