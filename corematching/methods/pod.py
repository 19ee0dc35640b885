"""PoD without training: layers that look at the same rows share the keys of the rows that lie far back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corematching.errors import UserError
from corematching.methods.base import ChooseRows, Geometry, Method, ReadRows, Stage
from corematching.methods.parameters import Budget, check_budget, check_least
from corematching.methods.rows import EVERYTHING, row_budget
from corematching.methods.views import PromptRowsView, StepView


def similarity(attention: Tensor, other: Tensor) -> Tensor:
    """[H]: 1 minus the Jensen-Shannon divergence (in bits) of attention rows [H, q, n], mean over the rows."""
    middle = ((attention + other) / 2).clamp(min=1e-30)
    first, second = (torch.xlogy(each, each / middle).sum(-1) for each in (attention, other))
    return (1 - (first + second) / (2 * math.log(2))).mean(1)


def lowest_layers(similar: list[list[bool]], heads: int) -> list[list[int]]:
    """Per layer and head: the lowest layer of its block, from whether each layer is like the one below it.

    ``similar[l][h]`` is of layers l and l + 1; a layer joins the block of the one below it if they are alike.
    """
    lowest = [[0] * heads]
    for layer, alike in enumerate(similar, start=1):
        below = lowest[-1]
        lowest.append([below[head] if alike[head] else layer for head in range(heads)])
    return lowest


@dataclass(frozen=True)
class PoD(Method):
    """PoD, proximal over distant (arXiv 2412.02252; no official code found), **without its post-training**.

    Rows are *proximal* (the first ones and the most recent) or *distant*. Neighbouring layers whose attention is alike
    form blocks, head by head; a layer attends to distant rows with the keys of its block's lowest layer and its own
    values, to proximal ones with its own keys, under one softmax (the paper's gate: the part of the proximal in the sum
    of exponentials). A head whose gate reaches ``gate`` reads proximal rows only.

    This is a training-free variant: the paper trains the model on 5 billion tokens to get used to shared keys, so these
    numbers are no statement about the paper's method. Further differences: blocks come from each prompt's own last
    ``observe`` tokens (there, offline from many samples); similarity is 1 minus the Jensen-Shannon divergence in bits
    (the paper's normalisation is not known to us); the prompt is prefilled densely; query heads of one KV head share
    block and gate (all of them must reach it); every layer still holds its own keys, so that no memory is saved here.
    Finding the gate reads all keys, which is booked as choosing.

    Parameters
    ----------
    keep
        Proximal rows, first ones included: a count, or a fraction of the rows after prefill. In the paper 4096.
    first
        How many of them are the first ones; in the paper 16.
    similar
        Similarity from which neighbouring layers share a block; in the paper 0.5.
    gate
        From which on distant rows are left out; in the paper 0.7. 1 = never.
    observe
        Last tokens of the prompt whose attention is compared.
    """

    keep: Budget
    first: int
    similar: float
    gate: float
    observe: int
    acts_on: ClassVar[frozenset[str]] = frozenset({"kv"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)
        check_least("first", self.first, 0)
        check_least("observe", self.observe)
        for name in ("similar", "gate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} is not valid: give a number in [0, 1]")

    def stages(self, geometry: Geometry) -> list[Stage]:
        return [ChooseRows(layer, self.choose, self.begin) for layer in range(geometry.depth)]

    def begin(self, view: PromptRowsView) -> None:
        attention = view.attention(min(self.observe, view.length))
        before, heads = view.memory.get("attention"), len(view.keys)
        alike = list(view.memory.get("alike", ()))
        if before is not None:
            same = before.shape == attention.shape  # a layer that fewer tokens enter shares no keys
            by_head = similarity(before, attention).unflatten(0, (heads, -1)).mean(1) if same else torch.zeros(heads)
            alike.append([own >= self.similar for own in by_head.tolist()])
        view.memory["attention"], view.memory["alike"] = attention, alike
        view.memory["lowest"] = lowest_layers(alike, heads)
        view.memory[view.layer] = row_budget(self.keep, view.rows)

    def choose(self, view: StepView) -> ReadRows | None:
        budget: int = view.memory[view.layer]
        first = min(self.first, budget - 1)
        recent = max(first, view.rows - (budget - first))
        if budget == EVERYTHING or recent == first:
            return None
        lowest: list[int] = view.memory["lowest"][view.layer]
        shared = {layer: view.keys_of(layer) for layer in set(lowest) - {view.layer}}
        index, keys = [], []
        every = torch.arange(view.rows, device=view.keys.device)
        proximal = torch.cat([every[:first], every[recent:]])
        groups = view.query.unflatten(0, (len(view.keys), -1))
        for head, (queries, below) in enumerate(zip(groups, lowest, strict=True)):
            own = view.keys[head]
            if below != view.layer:
                own = torch.cat([own[:first], shared[below][head, first:recent], own[recent:]])
            logits = (queries @ own.T).float() * own.shape[1] ** -0.5
            view.spend(2 * logits.numel() * own.shape[1], own.numel() * own.element_size())
            gate = logits.softmax(1)[:, proximal].sum(1)
            left_out = self.gate < 1 and bool((gate >= self.gate).all())
            index.append(proximal if left_out else every)
            keys.append(own[proximal] if left_out else own)
        if not shared and all(own is every for own in index):
            return None
        return ReadRows(index, keys)
