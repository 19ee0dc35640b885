"""ToMe: merge similar tokens in every block of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from corematching.errors import UserError
from corematching.methods.base import Geometry, Merge, Method, Stage, VisionBlocks
from corematching.methods.bipartite import bipartite_match, matching_flops
from corematching.methods.views import BlockView


@dataclass(frozen=True)
class ToMe(Method):
    """ToMe (ICLR 2023, arXiv 2210.09461; repository facebookresearch/ToMe).

    Between the attention residual and the MLP of every tower block, ``r`` tokens merge into their most similar partner
    (bipartite soft matching on the keys, mean over heads; [CLS] never merges). Sizes are carried through the blocks and
    weigh both the mean and, with ``proportional_attention``, the attention logits of later blocks.

    The tower hands on its feature layer's tokens, so merges in blocks after it cost time and change nothing. The tokens
    reach the LLM in the official order (staying even positions, then odd ones, block after block: not spatial) and get
    consecutive position ids. The tokens that stay are ``P - sum(r over the blocks up to the feature layer)`` per image;
    the trace lists each by the patch it started from.

    Differences from the official code: it is a classifier's method, its use in front of an LLM is this package's; runs
    on CLIP instead of timm towers; no distillation token.

    Parameters
    ----------
    r
        Tokens merged per block: an int (every block), a list (per block, padded with zeros) or a pair (r, inflection)
        with inflection in [-1, 1], the paper's linear schedules (-1 = decreasing to 0, 1 = increasing from 0). Two
        numbers are read as a pair if the second is in [-1, 1]. Counts are capped at half of the tokens. 0 = dense.
    proportional_attention
        Add log(size) of each token to the attention logits that look at it (official default).
    """

    r: int | tuple[float, ...]
    proportional_attention: bool
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        self.schedule(1)

    def schedule(self, depth: int) -> list[int]:
        """Tokens to merge in each of ``depth`` blocks.

        Raises
        ------
        UserError
            If ``r`` is none of the three valid forms.
        """
        problem = UserError(f"r={self.r!r} is not valid: give a count >= 0, a list of them, or (count, inflection)")
        values = self.r if isinstance(self.r, tuple | list) else (self.r,)
        if not values or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            raise problem
        if len(values) == 2 and -1 <= values[1] <= 1:
            return _linear(values[0], values[1], depth)
        if any(value < 0 or value != int(value) for value in values):
            raise problem
        counts = [int(value) for value in values]
        if not isinstance(self.r, tuple | list):
            return counts * depth
        return (counts + [0] * depth)[:depth]

    def stages(self, geometry: Geometry) -> list[Stage]:
        schedule = self.schedule(geometry.vision_depth)
        if isinstance(self.r, tuple | list) and len(self.r) > geometry.vision_depth:
            raise UserError(f"r lists {len(self.r)} blocks but the vision tower has {geometry.vision_depth}")
        if not any(schedule):
            return []

        def merge(view: BlockView) -> Merge | None:
            metric = view.keys.mean(2)
            matching = bipartite_match(metric, schedule[view.layer], class_token=True)
            if matching is None:
                return None
            view.spend(matching_flops(*metric.shape[1:]))
            return matching.merge(view.hidden, view.sizes, view.origin)

        return [VisionBlocks(merge, weigh_attention=self.proportional_attention)]


def _linear(r: float, inflection: float, depth: int) -> list[int]:
    """The paper's linear schedule around ``r``; every entry is truncated."""
    low = int(r * (1 - inflection))
    step = (2 * r - 2 * low) / (depth - 1) if depth > 1 else 0.0
    return [int(low + step * index) for index in range(depth)]
