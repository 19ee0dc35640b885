"""ActQKV: blocks of KV rows that a probe query resembles, with layer budgets by how spread the resemblance is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from corematching.methods.base import ChooseRows, Geometry, Method, ReadRows, Stage
from corematching.methods.parameters import Budget, check_budget, check_least
from corematching.methods.rows import EVERYTHING, Blocks, check_parts, part_of, row_budget
from corematching.methods.views import PromptRowsView, StepView

BEST_KEYS = 4
"""Keys of a block whose mean represents it."""
HISTORY = 100
"""Latest entropies of a layer whose mean counts."""
MOST_WINDOWS = 1000
"""Windows after which old ones begin to be forgotten."""


@dataclass(frozen=True)
class Statistics:
    """Running mean and variance of queries by channel, [C] each, over windows of tokens."""

    mean: Tensor
    variance: Tensor
    windows: int = 1

    @classmethod
    def of(cls, window: Tensor) -> Statistics:
        """Of a first window [T, C], T > 1."""
        return cls(window.mean(0), window.var(0))

    def followed_by(self, window: Tensor) -> Statistics:
        """With one more window, every window counting alike."""
        count, inverse = min(self.windows, MOST_WINDOWS), 1 / len(window)
        mean, variance = window.mean(0), window.var(0, unbiased=False)
        between = (mean - self.mean) ** 2 / (1 + 1 / count)
        return Statistics(
            (self.mean * count + mean) / (count + 1),
            (self.variance * (count - inverse) + variance + between) / (count + 1 - inverse),
            self.windows + 1,
        )

    def weights(self, queries: Tensor) -> Tensor:
        """[T] weights, summing to 1, of queries [T, C]: how far they are from the usual, on average over channels."""
        bias = (queries - self.mean) ** 2 / (self.variance + self.variance.mean() / 100)
        return bias.mean(1) / bias.mean(1).sum()


@dataclass(frozen=True)
class _Layer:
    """What a layer remembers."""

    blocks: Blocks
    budget: int
    """Blocks that a step reads, on average over the layers."""
    keys: Tensor
    """[N, C] representatives of the blocks."""
    received: Tensor
    """[H, t] local attention received so far by the rows behind the blocks."""
    entropies: tuple[float, ...] = ()
    statistics: Statistics | None = None
    queries: tuple[Tensor, ...] = ()
    """[C] of the latest steps, for the probe."""


@dataclass(frozen=True)
class ActQKV(Method):
    """ActQKV (arXiv 2502.13542; repository MrXiaoaa/ActQKV, ``context_manager_activate_3_dev.py``), its decode part.

    All KV rows stay. A step reads the first rows, the last ones, and blocks of those between: the blocks whose
    representatives (mean of the four keys with most local attention; heads side by side) are most like the probe query
    by cosine. All layers together read a fixed number of blocks; a layer's share is its entropy (of a softmax over its
    blocks' scores, over the logarithm of their number, mean of the last 100) over that of itself and all later layers.

    The probe is a mean of the last ``probe`` queries, weighted by their *activation bias*: squared distance to the
    running mean of queries in units of their variance, on average over channels. Officially a decode step's probe is
    its own query (``probe=1``), whose weight is 1 whatever the statistics.

    Differences from the official code: the prompt is prefilled densely (there, in windows of 256 tokens that retrieve,
    too, with the question's queries in the score); rows keep their positions and rotary embedding (there, retrieved
    keys stand at one far position); statistics and entropies are each prompt's own (there, process-wide), so shares
    begin after ``warm_up`` steps and not 100 values; a layer's least is a part of the mean and not 32 blocks, and
    bounds leave enough for later layers, so that budgets sum to the total; the block that is complete after a step is
    there from the next one on; no tiers of memory: rows stay on the device.

    Parameters
    ----------
    keep
        KV rows that a step reads, on average over the layers, first and last ones included: a count, or a fraction of
        the rows after prefill. Officially 2048.
    first, last
        How many of them are the first and the last rows: a count, or a fraction of ``keep``. Officially 64 and 512.
    block
        Rows of a block.
    probe
        Latest queries that make the probe.
    least
        Blocks that every layer gets: a count, or a fraction of the mean. At most twice the mean.
    warm_up
        Steps during which layers share evenly.
    """

    keep: Budget
    first: Budget
    last: Budget
    block: int
    probe: int
    least: Budget
    warm_up: int
    acts_on: ClassVar[frozenset[str]] = frozenset({"kv"})

    def __post_init__(self) -> None:
        for name in ("keep", "first", "last", "least"):
            check_budget(name, getattr(self, name))
        check_least("block", self.block)
        check_least("probe", self.probe)
        check_parts(self.keep, self.first, self.last)
        check_least("warm_up", self.warm_up, 0)

    def stages(self, geometry: Geometry) -> list[Stage]:
        return [ChooseRows(layer, self.choose, self.begin) for layer in range(geometry.depth)]

    # ------------------------------------------------------------------------------------------------------ prompt
    def begin(self, view: PromptRowsView) -> None:
        rows = row_budget(self.keep, view.rows)
        if rows == EVERYTHING:
            view.memory[view.layer] = None
            return
        first, last = part_of(self.first, rows), part_of(self.last, rows)
        budget = max(1, (rows - first - last) // self.block)
        queries = view.queries(view.length)
        received = self._local_attention(view, queries, last)
        channels = queries.shape[0] * queries.shape[2]
        layer = _Layer(Blocks(first, self.block, last), budget, view.keys.new_empty(0, channels), received[:, first:])
        layer = self._complete(layer, view.keys, view.rows)
        if self.probe > 1:
            windows = _side_by_side(queries).float().split(WINDOW)
            layer = replace(layer, statistics=_statistics(windows))
        view.memory[view.layer] = layer
        view.memory["rows"] = {**view.memory.get("rows", {}), view.layer: view.rows}

    @staticmethod
    def _local_attention(view: PromptRowsView, queries: Tensor, reach: int) -> Tensor:
        """[H, n]: attention that rows receive from the prompt's tokens among the ``reach`` rows up to each of them."""
        before = view.rows - view.length
        received = torch.zeros(len(queries), view.rows, device=queries.device)
        groups = len(queries) // len(view.keys)
        for start in range(0, view.length, WINDOW):
            own = queries[:, start : start + WINDOW]
            stop = before + start + own.shape[1]
            low = max(0, before + start - reach + 1)
            keys = view.keys[:, low:stop].repeat_interleave(groups, 0)
            logits = (own @ keys.transpose(1, 2)).float() * own.shape[2] ** -0.5
            view.spend(2 * logits.numel() * own.shape[2])
            place = torch.arange(low, stop, device=own.device)
            query = place[-own.shape[1] :, None]
            seen = (place <= query) & (place > query - reach)
            logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
            received[:, low:stop] += logits.softmax(-1).sum(1)
        return received

    @staticmethod
    def _complete(layer: _Layer, keys: Tensor, rows: int) -> _Layer:
        """Make blocks of what has come to stand before the last rows."""
        done, size = len(layer.keys), layer.blocks.size
        new = layer.blocks.count(rows) - done
        if new <= 0:
            return layer
        start = layer.blocks.first + done * size
        received = layer.received[:, : new * size].unflatten(1, (new, size))
        own = keys[:, start : start + new * size].repeat_interleave(len(received) // len(keys), 0)
        best = received.topk(min(BEST_KEYS, size), dim=2).indices
        chosen = own.unflatten(1, (new, size)).gather(2, best[..., None].expand(-1, -1, -1, own.shape[2]))
        made = _side_by_side(chosen.mean(2))
        return replace(layer, keys=torch.cat([layer.keys, made]), received=layer.received[:, new * size :])

    # -------------------------------------------------------------------------------------------------------- step
    def choose(self, view: StepView) -> ReadRows | None:
        layer: _Layer | None = view.memory[view.layer]
        if layer is None:
            return None
        layer, probe = self._probe(layer, view.query.flatten())
        decision = None
        if len(layer.keys):
            view.spend(2 * layer.keys.numel(), layer.keys.numel() * layer.keys.element_size())
            scores = cosine_similarity(layer.keys.float(), probe[None], dim=1)
            layer = replace(layer, entropies=(*layer.entropies, _entropy(scores))[-HISTORY:])
            view.memory[view.layer] = layer
            count = self._share(view, layer)
            chosen = scores.topk(count).indices.sort().values
            decision = layer.blocks.read(chosen.expand(len(view.keys), -1), len(scores), view.rows)
        view.memory[view.layer] = self._complete(self._received(layer, view), view.keys, view.rows)
        return decision

    def _probe(self, layer: _Layer, query: Tensor) -> tuple[_Layer, Tensor]:
        query = query.float()
        if layer.statistics is None:
            return layer, query
        queries = (*layer.queries, query)[-self.probe :]
        stacked = torch.stack(queries)
        probe = (layer.statistics.weights(stacked)[:, None] * stacked).sum(0)
        return replace(layer, queries=queries, statistics=layer.statistics.followed_by(query[None])), probe

    def _share(self, view: StepView, layer: _Layer) -> int:
        """Blocks that this layer reads in this step; notes what is left for later ones."""
        lengths: dict[int, int] = view.memory["rows"]
        layers = sorted(lengths)
        notes: list[_Layer] = [view.memory[each] for each in layers]
        place = layers.index(view.layer)
        # Later layers have not seen this step yet: their blocks are those of the step before, which they choose from.
        most = [min(len(note.keys), 2 * note.budget) for note in notes]
        least = [min(high, part_of(self.least, note.budget)) for note, high in zip(notes, most, strict=True)]
        left = sum(note.budget for note in notes) if place == 0 else view.memory["left"]
        warm = view.step >= self.warm_up
        means = [
            sum(note.entropies) / len(note.entropies) if warm and note.entropies else 1.0 for note in notes[place:]
        ]
        count = share_of(left, means, least[place:], most[place:])
        view.memory["left"] = left - count
        return count

    @staticmethod
    def _received(layer: _Layer, view: StepView) -> _Layer:
        """The rows behind the blocks receive the step's attention to the last rows."""
        tail = layer.received.shape[1] + 1
        reach = min(layer.blocks.last, tail)
        last = torch.arange(view.rows - reach, view.rows, device=view.keys.device).expand(len(view.keys), -1)
        return replace(layer, received=pad(layer.received, (0, 1)) + pad(view.attention(last), (tail - reach, 0)))


WINDOW = 256
"""Tokens of a prompt that are looked at together."""


def share_of(left: int, entropies: list[float], least: list[int], most: list[int]) -> int:
    """What the first of some layers gets of what is left for them all, by its part of their entropies.

    Whatever it wishes, later layers must be able to get their least, and to take the rest.
    """
    total = sum(entropies)
    wanted = round(left * entropies[0] / total) if total > 0 else round(left / len(entropies))
    wanted = min(wanted, left - sum(least[1:]))
    wanted = max(wanted, left - sum(most[1:]), least[0])
    return min(wanted, most[0])


def _entropy(scores: Tensor) -> float:
    """Entropy of a softmax over the scores, over its largest value."""
    if len(scores) == 1:
        return 1.0
    logs = scores.log_softmax(0)
    return float(-(logs.exp() * logs).sum() / torch.tensor(float(len(scores))).log())


def _side_by_side(heads: Tensor) -> Tensor:
    """[H, T, hd] -> [T, H * hd]."""
    return heads.transpose(0, 1).flatten(1)


def _statistics(windows: tuple[Tensor, ...]) -> Statistics:
    found = Statistics.of(windows[0])
    for window in windows[1:]:
        found = found.followed_by(window)
    return found
