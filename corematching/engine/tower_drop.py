"""The vision tower when patches leave between its blocks: images of one batch then differ in length.

Tokens of all images lie one behind the other, [S, d]; projections and MLPs run over all of them at once, attention runs
image by image. Until the first patch leaves, blocks run as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from corematching.engine.views import Ledger
from corematching.methods.base import VisionDrop

Signals = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and outputs of every head in a block, [S, H, hd] each."""


@dataclass(frozen=True)
class Packed:
    """The tokens of N images, each image's [CLS] first: ``hidden`` [S, d], ``origin`` [S] their tower positions."""

    hidden: Tensor
    origin: Tensor
    counts: list[int]

    @classmethod
    def of(cls, hidden: Tensor) -> Packed:
        """From [N, T, d]."""
        images, length = hidden.shape[:2]
        origin = torch.arange(length, device=hidden.device).expand(images, -1)
        return cls(hidden.flatten(0, 1), origin.flatten(), [length] * images)

    def padded(self, values: Tensor, padding: float = 0) -> Tensor:
        """[S, ...] -> [N, T, ...], padded at the end."""
        if len(set(self.counts)) == 1:
            return values.unflatten(0, (len(self.counts), -1))
        return pad_sequence(list(values.split(self.counts)), batch_first=True, padding_value=padding)

    @property
    def valid(self) -> Tensor:
        """Bool [N, T]."""
        lengths = torch.tensor(self.counts, device=self.hidden.device)
        return torch.arange(max(self.counts), device=self.hidden.device) < lengths[:, None]

    def keep(self, patches: Tensor) -> Packed:
        """Only [CLS] and the marked patches, bool [N, T - 1]; synchronises once, to count them."""
        marked = torch.nn.functional.pad(patches, (1, 0), value=True) & self.valid
        counts = marked.sum(1).tolist()
        if counts == self.counts:
            return self
        rows = marked[self.valid].nonzero()[:, 0]
        return Packed(self.hidden[rows], self.origin[rows], counts)


@dataclass
class Tokens:
    """See :class:`corematching.methods.views.TowerView`."""

    layer: int
    packed: Packed
    query: Tensor
    """[S, H, hd] of the block before, not scaled."""
    keys: Tensor
    heads: Tensor
    """[S, H, hd] what every head gave out there."""
    ledger: Ledger

    @property
    def valid(self) -> Tensor:
        return self.packed.valid[:, 1:]

    def cls_attention(self) -> Tensor:
        keys = self.packed.padded(self.keys).transpose(1, 2)
        query = self.packed.padded(self.query)[:, :1].transpose(1, 2)
        self.spend([2.0 * count * self.keys[0].numel() for count in self.packed.counts])
        logits = (query @ keys.transpose(2, 3)).float() * query.shape[-1] ** -0.5
        return logits.masked_fill(~self.packed.valid[:, None, None], -torch.inf).softmax(-1)[:, :, 0, 1:]

    def head_norms(self) -> Tensor:
        return self.packed.padded(self.heads).float().norm(dim=-1).transpose(1, 2)[:, :, 1:]

    def spend(self, flops: float | Sequence[float]) -> None:
        self.ledger.spend(flops)


@dataclass(frozen=True)
class TowerPass:
    """What a pass of the tower's blocks left behind."""

    states: list[Tensor]
    """The input of the first block and the output of every block, [N, T, d]; padded at the end where images differ."""
    origins: list[Tensor]
    """Per state, long [N, T]: tower position of each token, -1 on padding."""
    attention_tokens: list[list[int]]
    """Per block: tokens of every image that enter its attention."""
    mlp_tokens: list[list[int]]
    dropped: bool = False
    """Whether patches left, so that ``attention_tokens`` also says how long the images of a state are."""


def dropping_pass(layers: Any, hidden: Tensor, stage: VisionDrop, ledger: Ledger) -> TowerPass:
    """Run the tower's blocks over [N, T, d]; before each of ``stage.layers``, patches leave."""
    packed, length = Packed.of(hidden), hidden.shape[1]
    signals: Signals | None = None
    ran = TowerPass([hidden], [packed.origin.unflatten(0, hidden.shape[:2])], [], [])
    for index, layer in enumerate(layers):
        if index in stage.layers:
            assert signals is not None
            tokens = Tokens(index, packed, *signals, ledger)
            packed = packed.keep(stage.select(tokens).mask)
        whole = min(packed.counts) == length
        packed, signals = _whole_block(layer, packed) if whole else _ragged_block(layer, packed)
        ran.states.append(packed.padded(packed.hidden))
        ran.origins.append(packed.padded(packed.origin, padding=-1))
        ran.attention_tokens.append(packed.counts)
        ran.mlp_tokens.append(packed.counts)
    return replace(ran, dropped=min(packed.counts) < length)


def _whole_block(layer: Any, packed: Packed) -> tuple[Packed, Signals]:
    """A block as it is; what its attention saw is read off its projections."""
    attn = layer.self_attn
    seen: dict[str, Tensor] = {}
    hooks = [
        attn.q_proj.register_forward_hook(lambda module, inputs, output: seen.update(query=output)),
        attn.k_proj.register_forward_hook(lambda module, inputs, output: seen.update(keys=output)),
        attn.out_proj.register_forward_pre_hook(lambda module, inputs: seen.update(heads=inputs[0])),
    ]
    try:
        hidden = layer(packed.padded(packed.hidden), None)
    finally:
        for hook in hooks:
            hook.remove()
    query, keys, heads = (
        seen[name].flatten(0, 1).unflatten(-1, (-1, attn.head_dim)) for name in ("query", "keys", "heads")
    )
    return replace(packed, hidden=hidden.flatten(0, 1)), (query, keys, heads)


def _ragged_block(layer: Any, packed: Packed) -> tuple[Packed, Signals]:
    attn, normed = layer.self_attn, layer.layer_norm1(packed.hidden)
    query, keys, values = (
        projection(normed).unflatten(-1, (-1, attn.head_dim)) for projection in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    images = zip(*(states.split(packed.counts) for states in (query, keys, values)), strict=True)
    heads = torch.cat([_attend(image, attn.scale) for image in images])
    hidden = packed.hidden + attn.out_proj(heads.flatten(1))
    return replace(packed, hidden=hidden + layer.mlp(layer.layer_norm2(hidden))), (query, keys, heads)


def _attend(image: tuple[Tensor, ...], scale: float) -> Tensor:
    """Attention within one image, [T, H, hd] each."""
    query, keys, values = (states.transpose(0, 1)[None] for states in image)
    return scaled_dot_product_attention(query, keys, values, scale=scale)[0].transpose(0, 1)
