"""Training AttentionPredictor's net on dense attention: rows of past tokens by block, and the row that came next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from corematching.methods.attention_predictor import SHAPES, by_block, predict
from corematching.methods.base import ChooseRows, Geometry, Method, Stage
from corematching.methods.rows import Blocks
from corematching.methods.views import PromptRowsView, StepView

BLOCKS = Blocks(first=16, size=16, last=16)
"""First and last rows that the net never sees, and the size of its blocks."""
HISTORY = 64
LOOKED_AT = 4
"""Of so many tokens, recall looks at one."""


@dataclass(frozen=True)
class _Recorder(Method):
    """Reads everything, and keeps every layer's attention by block."""

    rows: dict[int, list[Tensor]] = field(default_factory=dict)
    acts_on: ClassVar[frozenset[str]] = frozenset({"kv"})

    def stages(self, geometry: Geometry) -> list[Stage]:
        return [ChooseRows(layer, self.note, self.begin) for layer in range(geometry.depth)]

    def begin(self, view: PromptRowsView) -> None:
        self.rows[view.layer] = [by_block(view.attention(min(HISTORY, view.length)), BLOCKS.size)]

    def note(self, view: StepView) -> None:
        self.rows[view.layer].append(by_block(view.attention()[:, None], BLOCKS.size))


@torch.no_grad()
def collect(model: Any, prompts: Iterable[dict[str, Tensor]], answer_tokens: int) -> list[Tensor]:
    """Per prompt: [layers, H, T, N] attention of its last tokens and its answer's by block, T in order.

    Answers go on to ``answer_tokens`` whether they have ended or not. N are the blocks that the prompt had.
    """
    traces = []
    for prompt in prompts:
        recorder = _Recorder()
        with recorder(model) as trace:
            model.generate(**prompt, max_new_tokens=answer_tokens + 1, do_sample=False, eos_token_id=None)
        count, start = BLOCKS.count(trace.drain()[0].prompt_tokens), BLOCKS.first // BLOCKS.size
        layers = [torch.cat([row[..., start : start + count] for row in rows], 1) for rows in recorder.rows.values()]
        traces.append(torch.stack(layers).cpu())
    return traces


def untrained(seed: int) -> dict[str, Tensor]:
    """The net's parameters before training."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in SHAPES.items():
        inputs = SHAPES[name.replace("bias", "weight")][1:]
        reach = torch.Size(inputs).numel() ** -0.5
        weights[name] = (2 * torch.rand(shape, generator=generator) - 1) * reach
    return weights


def train(traces: list[Tensor], steps: int, batch: int = 32, rate: float = 2e-3, seed: int = 0) -> dict[str, Tensor]:
    """Parameters that predict the next row by block, by mean squared error.

    Every step takes windows of one prompt, drawn over its layers, heads and tokens. The learning rate falls to 0.
    """
    weights = {name: weight.requires_grad_() for name, weight in untrained(seed).items()}
    optimiser = torch.optim.Adam(weights.values(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = traces[step % len(traces)].flatten(0, 1)
        sequence = torch.randint(len(rows), (batch,), generator=generator)
        token = torch.randint(HISTORY, rows.shape[1], (batch,), generator=generator)
        window = token[:, None] - torch.arange(HISTORY, 0, -1)
        loss = mse_loss(predict(weights, rows[sequence[:, None], window]), rows[sequence, token])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return {name: weight.detach() for name, weight in weights.items()}


def scores_of(weights: dict[str, Tensor] | None, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of [S, T, N] rows, some tokens: scores [S, N] of a net (None: the mean of the history), and the true row."""
    for token in range(HISTORY, rows.shape[1], LOOKED_AT):
        history = rows[:, token - HISTORY : token]
        yield (history.mean(1) if weights is None else predict(weights, history)), rows[:, token]


@torch.no_grad()
def recall(weights: dict[str, Tensor] | None, trace: Tensor, share: float) -> float:
    """Share of a prompt's truly best blocks (``share`` of all) among as many best-scored ones."""
    rows = trace.flatten(0, 1)
    count = max(1, int(share * rows.shape[2]))
    found = []
    for scores, true in scores_of(weights, rows):
        best = true.topk(count, dim=1).indices
        chosen = torch.zeros_like(true, dtype=torch.bool).scatter(1, scores.topk(count, dim=1).indices, True)
        found.append(chosen.gather(1, best).float().mean())
    return float(torch.stack(found).mean())
