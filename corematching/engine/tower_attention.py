"""Attention to the patches in layers of a stock vision tower, noted while the tower runs.

Only what a method asks for is recomputed: the row of [CLS], or, where the tower has none, what every patch receives on
average over the patches of its crop or frame.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from corematching.engine.views import rotate

if TYPE_CHECKING:
    from corematching.engine.session import Session

ROWS_AT_ONCE = 512
"""Query rows whose attention is held at a time."""


class TowerAttention:
    """Hooks on the vision tower of one installed method.

    Parameters
    ----------
    layers
        Tower layers to note.
    """

    def __init__(self, session: Session, layers: Sequence[int]) -> None:
        self.session, self.layers = session, layers
        self.with_cls = session.family.has_cls(session.model.config)
        self.notes: dict[int, Tensor] = {}
        """Per layer: [H, patches] of the latest images, in the tower's order."""

    def install(self) -> None:
        for layer in self.layers:
            module = self.session.family.tower_attention(self.session.model, layer)
            hook = functools.partial(self._note, layer)
            self.session.hook(module.register_forward_pre_hook(hook, with_kwargs=True))

    def of_tokens(self) -> dict[int, Tensor]:
        """Per layer: [H, visual tokens] of the latest images; NaN for newlines."""
        session = self.session
        inputs = {**session.visual_inputs, "input_ids": session.input_ids}
        return {layer: session.family.of_tokens(session.model, own, inputs) for layer, own in self.notes.items()}

    def flops(self, patches: tuple[int, int, int]) -> float:
        """Matrix products of the noted rows, for one image."""
        config = self.session.model.config
        width = config.vision_config.hidden_size
        sequences = self.session.family.tower_sequences(config, patches)
        lengths = [length for layer in self.layers for length in sequences[layer]]
        if self.with_cls:
            return sum(2.0 * (length + 1) * width**2 + 2.0 * length * width for length in lengths)
        return sum(4.0 * length * width**2 + 2.0 * length**2 * width for length in lengths)

    def _note(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if hasattr(module, "qkv"):
            queries, keys = _fused(module, hidden, kwargs["position_embeddings"])
            lengths = kwargs["cu_seqlens"].diff().tolist()
            pairs = zip(queries.split(lengths, 1), keys.split(lengths, 1), strict=True)
            self.notes[layer] = torch.cat([received(own, others) for own, others in pairs], 1)
            return
        queries, keys = _separate(module, hidden)
        if self.with_cls:
            rows = [_attention(own[:, :1], others)[:, 0, 1:] for own, others in zip(queries, keys, strict=True)]
        else:
            rows = [received(own, others) for own, others in zip(queries, keys, strict=True)]
        self.notes[layer] = torch.cat(rows, 1)


def received(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention [H, n] that each of n tokens receives, on average over all: queries and keys [H, n, hd]."""
    total = torch.zeros(keys.shape[:2], device=keys.device)
    for rows in queries.split(ROWS_AT_ONCE, 1):
        total += _attention(rows, keys).sum(1)
    return total / queries.shape[1]


def _attention(queries: Tensor, keys: Tensor) -> Tensor:
    """[H, R, n] probabilities of [H, R, hd] over [H, n, hd], in float32."""
    return ((queries @ keys.transpose(1, 2)).float() * queries.shape[-1] ** -0.5).softmax(-1)


def _fused(module: Any, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys [H, n, hd] of packed sequences [n, d]."""
    parts = module.qkv(hidden).unflatten(1, (3, module.num_heads, -1)).permute(1, 2, 0, 3)
    cos, sin = (part.float()[None] for part in rope)
    queries, keys = (rotate(part.float()[None], cos, sin)[0].to(part.dtype) for part in parts[:2])
    return queries, keys


def _separate(module: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [N, H, n, hd] of sequences [N, n, d]."""
    parts = []
    for part in ("q", "k"):
        norm = getattr(module, f"{part}_norm", nn.Identity())  # over the whole width, before heads are split
        states = norm(getattr(module, f"{part}_proj")(hidden))
        parts.append(states.unflatten(-1, (-1, module.head_dim)).transpose(1, 2))
    return parts[0], parts[1]
