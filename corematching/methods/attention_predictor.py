"""AttentionPredictor: a small convolutional net predicts from past attention which blocks of KV rows a step needs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from corematching.errors import UserError
from corematching.methods.base import ChooseRows, Geometry, Method, ReadRows, Stage
from corematching.methods.parameters import Budget, check_budget, check_layer, check_least
from corematching.methods.rows import EVERYTHING, Blocks, check_parts, part_of, row_budget, strongest_of_group
from corematching.methods.stored import stored
from corematching.methods.views import PromptRowsView, StepView
from corematching.registry import file_of

BUNDLED = Path(__file__).with_suffix(".pt")
"""Weights of scripts/train_attention_predictor.py on the bundled model."""
MEAN = "mean"
SHAPES = {
    "first.weight": (16, 1, 3, 3),
    "first.bias": (16,),
    "second.weight": (32, 16, 3, 3),
    "second.bias": (32,),
    "third.weight": (1, 32),
    "third.bias": (1,),
}
"""Of the net's parameters."""
LEAST_CANDIDATES = 3
"""With fewer blocks to choose from, all are read."""


def predict(weights: Mapping[str, Tensor], history: Tensor) -> Tensor:
    """Scores [H, N] of blocks for the next step, from their attention in the last ones, [H, T, N].

    Two 3 x 3 convolutions with ReLU, a mean over time, a linear map: about 5,000 weights for all heads and layers.
    """
    x = conv2d(history[:, None], weights["first.weight"], weights["first.bias"], padding=1).relu()
    x = conv2d(x, weights["second.weight"], weights["second.bias"], padding=1).relu()
    return (weights["third.weight"] @ x.mean(2))[:, 0] + weights["third.bias"]


def predict_flops(heads: int, steps: int, blocks: int) -> float:
    """Cost of :func:`predict`, 2 per multiply-add."""
    return 2.0 * heads * blocks * (steps * (16 * 9 + 32 * 16 * 9) + 32)


@functools.lru_cache(maxsize=8)
def load_weights(path: Path) -> dict[str, Tensor]:
    """Read the net's parameters.

    Raises
    ------
    UserError
        If there is no such file, or it is no such net's.
    """
    try:
        weights = stored(path, "weights")
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"predictor={str(path)!r} cannot be read as the net's weights: {error}") from error
    if shapes != SHAPES:
        raise UserError(f"predictor={str(path)!r} was made for another net")
    return {name: weight.float() for name, weight in weights.items()}


def by_block(attention: Tensor, size: int) -> Tensor:
    """The largest attention in every block: [H, T, n] -> [H, T, ceil(n / size)]."""
    missing = -attention.shape[2] % size
    return pad(attention, (0, missing)).unflatten(2, (-1, size)).amax(3)


def appended(history: Tensor, row: Tensor) -> Tensor:
    """History [H, T, N] without its oldest row and with one more, [H, N'], at its end; new blocks were 0 so far."""
    history = pad(history, (0, row.shape[1] - history.shape[2]))
    return torch.cat([history[:, 1:], row[:, None]], 1)


@dataclass(frozen=True)
class _Layer:
    blocks: Blocks
    budget: int
    """Blocks that a step reads."""
    history: Tensor
    """[H, T, N']: attention of the latest tokens by block, first and last rows included."""


@dataclass(frozen=True)
class AttentionPredictor(Method):
    """AttentionPredictor (NeurIPS 2025, arXiv 2502.04077; repository MIRALab-USTC/LLM-AttentionPredictor).

    All KV rows stay. Every head keeps the attention of its latest tokens, the largest in every block of rows. Before a
    step, a small convolutional net (one for all heads and layers) predicts the step's attention by block; the step
    reads the best-scored blocks, the first rows and the last. Its own attention to the rows it read joins the history;
    every few steps all rows' attention is computed for that instead (the step's answer still comes from the chosen).

    The official weights are for two language models; the ones bundled here are trained on the bundled model's dense
    attention by ``scripts/train_attention_predictor.py`` (MSE to the next step's row, as the paper says; its training
    code is not public), and that script says what they gain over an untrained net.

    Differences from the official code: KV rows are chosen by KV head, a block's score the largest of its query heads'
    (there, every query head has its mask); blocks are counted from the first rows on and are whole, so that a head
    reads between ``last`` and ``last + block - 1`` last rows (there, the last partial block may overlap the last rows);
    what is not chosen is not read (there, its logits are lowered); no prefetch from the host.

    Parameters
    ----------
    keep
        KV rows that a step reads per layer and head, first and last ones included: a count, or a fraction of the rows
        after prefill. Officially 1024.
    first, last
        How many of them are the first and the last rows: a count, or a fraction of ``keep``; first ones are rounded to
        whole blocks. Officially 64 each.
    block
        Rows of a block.
    history
        Latest tokens whose attention the net sees.
    every
        Steps from one calibration to the next; null = none.
    first_layer
        Layers before this one read everything.
    predictor
        File with the net's weights; null = the bundled ones; "mean" = no net: the mean of the history.
    """

    keep: Budget
    first: Budget
    last: Budget
    block: int
    history: int
    every: int | None
    first_layer: int
    predictor: str | None
    acts_on: ClassVar[frozenset[str]] = frozenset({"kv"})

    def __post_init__(self) -> None:
        for name in ("keep", "first", "last"):
            check_budget(name, getattr(self, name))
        check_least("block", self.block)
        check_least("history", self.history)
        if self.every is not None:
            check_least("every", self.every)
        check_parts(self.keep, self.first, self.last)

    def stages(self, geometry: Geometry) -> list[Stage]:
        check_layer("first_layer", self.first_layer, geometry.depth)
        self._weights(torch.device("cpu"))
        return [ChooseRows(layer, self.choose, self.begin) for layer in range(self.first_layer, geometry.depth)]

    def _weights(self, device: torch.device) -> dict[str, Tensor] | None:
        if self.predictor == MEAN:
            return None
        weights = load_weights(BUNDLED if self.predictor is None else file_of(self.predictor))
        return {name: weight.to(device) for name, weight in weights.items()}

    def begin(self, view: PromptRowsView) -> None:
        rows = row_budget(self.keep, view.rows)
        if rows == EVERYTHING:
            view.memory[view.layer] = None
            return
        size = self.block
        first = max(1, round(part_of(self.first, rows) / size)) * size
        last = part_of(self.last, rows)
        attention = view.attention(min(self.history, view.length))
        missing = self.history - attention.shape[1]
        seen = pad(by_block(attention, size), (0, 0, missing, 0))
        view.memory[view.layer] = _Layer(Blocks(first, size, last), max(1, (rows - first - last) // size), seen)

    def choose(self, view: StepView) -> ReadRows | None:
        layer: _Layer | None = view.memory[view.layer]
        if layer is None:
            return None
        count = layer.blocks.count(view.rows)
        decision = None
        if count >= LEAST_CANDIDATES:
            start = layer.blocks.first // self.block
            scores = self._scores(view, layer.history[:, :, start : start + count])
            best = strongest_of_group(scores, len(view.keys)).topk(min(layer.budget, count), dim=1).indices
            decision = layer.blocks.read(best.sort(1).values, count, view.rows)
        calibrates = self.every is not None and (view.step + 1) % self.every == 0
        row = self._attention(view, None if calibrates else decision)
        history = appended(layer.history, by_block(row[:, None], self.block)[:, 0])
        view.memory[view.layer] = _Layer(layer.blocks, layer.budget, history)
        return decision

    def _scores(self, view: StepView, history: Tensor) -> Tensor:
        weights = self._weights(history.device)
        if weights is None:
            return history.mean(1)
        read = history.numel() * history.element_size()
        view.spend(predict_flops(*history.shape), read)
        return predict(weights, history)

    @staticmethod
    def _attention(view: StepView, decision: ReadRows | None) -> Tensor:
        """[H, n]: the step's attention, 0 where it reads nothing."""
        if decision is None:
            return view.attention()
        assert isinstance(decision.index, Tensor)
        found = view.attention(decision.index)
        index = decision.index.repeat_interleave(len(found) // len(decision.index), 0)
        return found.new_zeros(len(found), view.rows).scatter(1, index, found)
