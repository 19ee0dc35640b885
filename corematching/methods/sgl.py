"""SGL: a small model answers first and tells the large one which visual tokens matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from corematching.errors import UserError
from corematching.methods.base import Geometry, Guide, Keep, Method, Stage
from corematching.methods.parameters import Budget, check_budget, check_count, check_layer
from corematching.methods.selection import keep_top
from corematching.methods.views import LayerView


@dataclass(frozen=True)
class SGL(Method):
    """Small VLM guides large VLM (SGL, CVPR 2025, arXiv 2412.03324; repository NUS-HPC-AI-Lab/SGL).

    A small model with the same visual tokens answers the prompt greedily. The attention its visual tokens receive,
    from the positions after the image and from every token of the answer, is summed over layers and heads. At the
    input of layer ``int(depth * layer_fraction)`` the large model drops all but the top ``keep`` tokens by this score;
    kept ones keep order and position ids. With ``early_exit``, the small model scores its answer again with its own
    visual tokens pruned likewise before layer 0; if the product of the answer's token probabilities reaches the
    threshold, the answer is final and the large model never runs.

    The small model's full cost is counted in the trace. Efficiency rows do not call ``generate``: they time and count
    its reading of the prompt, not its answer.

    Differences from the official code: batches (samples exit one by one); the pruned re-scoring keeps the same share
    as the large model, where the official scripts have a second parameter; called without ``generate``, the small
    model only reads the prompt, since there is no answer to wait for.

    Parameters
    ----------
    guide
        The small model: a ``conf/model`` name, local path or hub id. It must share visual grid and tokenizer.
    layer_fraction
        Where tokens leave, as a fraction of the large model's depth (truncated to a layer).
    keep
        Visual tokens to keep per sample (count, or fraction truncated as in the official code).
    early_exit
        Confidence from which the small model's answer is final, in (0, 1]; None = never.
    """

    guide: str
    layer_fraction: float
    keep: Budget
    early_exit: float | None
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)
        if not 0 <= self.layer_fraction < 1:
            raise UserError(f"layer_fraction={self.layer_fraction} is not valid: give a fraction in [0, 1)")
        if self.early_exit is not None and not 0 < self.early_exit <= 1:
            raise UserError(
                f"early_exit={self.early_exit} is not valid: give a confidence in (0, 1], or null for never"
            )

    def stages(self, geometry: Geometry) -> list[Stage]:
        check_count("keep", self.keep, geometry.image_tokens)
        layer = check_layer("layer_fraction", int(geometry.depth * self.layer_fraction), geometry.depth)
        return [Guide(self.guide, layer, self.select, self.early_exit)]

    def select(self, scores: Tensor, view: LayerView) -> Keep:
        return keep_top(scores, self.keep, view.visual_valid, view.visual_counts)
