"""Packed batches through the language model, and the layers in which text may read its image.

In real models of this kind the image is read in the middle of the stack: shallow layers find out what is asked and
where to look, deep ones turn what was read into an answer. A model that is small and trained from such clean codes
reads at once, in its first layers. Hiding the image there does not last: shown at the end, it is read there again.

So training lies to the text outside the reading layers. Below them text sees the keys of its own image but the values
of a *twin*, a scene with the same layout and other contents: attention may learn where things are, never what they
are. Above them it sees keys and values of some other image of the batch. Text learns to take nothing from the image
there, and inference, with nothing swapped, is stock.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from corematching.benchmarks.mini.scenes import COLOURS, DIGITS, SHAPES, TEXTURES, WORDS, Scene

IGNORED = -100


@dataclass(frozen=True)
class PackedBatch:
    """Images with packed questions; T = prefix + visual tokens + padded question blocks.

    Attributes
    ----------
    scenes : list of Scene
    index : LongTensor (n, visual)
        Raster index of each visual token, ascending.
    prefix : LongTensor (prefix,)
        Token ids before the image.
    text : LongTensor (n, text)
        Token ids of the blocks.
    positions : LongTensor (n, T)
    mask : BoolTensor (n, 1, text, T)
        True where a text row may see a column; the rows before are causal.
    targets, hidden_targets : LongTensor (n, text)
        Next token to predict at the output, and the open answer's word at the middle layer, ``IGNORED`` elsewhere.
    spots : LongTensor (n, text, 2)
        On the last token of questions about one object: left or right, and top or bottom; ``IGNORED`` elsewhere.
    owner : LongTensor (n, text)
        Number of the block that a text token belongs to, -1 for padding.
    names : list of list of str
        Family of each block, with a ``+`` for lettered choices.
    """

    scenes: list[Scene]
    index: Tensor
    prefix: Tensor
    text: Tensor
    positions: Tensor
    mask: Tensor
    targets: Tensor
    hidden_targets: Tensor
    spots: Tensor
    owner: Tensor
    names: list[list[str]]

    def to(self, device: str | torch.device) -> PackedBatch:
        """A copy with all tensors on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return PackedBatch(**{**vars(self), **tensors})


@dataclass(frozen=True)
class ReadingLayers:
    """Decoder layers ``first`` to ``stop - 1`` show text its own image; the batch is scenes, then their twins.

    At least two scenes, so that each has a stranger.
    """

    first: int
    stop: int

    def sources(self, layer: int, n: int) -> tuple[Tensor, Tensor] | None:
        """From which row of the batch each row's text sees visual keys and values; None where from its own."""
        if self.first <= layer < self.stop:
            return None
        rows, half = torch.arange(n), n // 2
        if layer < self.first:
            return rows, (rows + half) % n
        stranger = (rows + 1) % half + rows // half * half
        return stranger, stranger


def twin_of(scene: Scene, rng: random.Random) -> Scene:
    """The same places, sizes, categories and background; other colours, kinds and textures."""
    colours, words = rng.sample(tuple(COLOURS), len(scene.objects)), rng.sample(WORDS, len(scene.objects))
    objects = tuple(
        replace(
            item,
            colour=colour,
            kind={"shape": rng.choice(SHAPES), "digit": rng.choice(DIGITS), "word": word}[item.category],
            texture=rng.choice(TEXTURES) if item.category == "shape" and item.width > 1 else "plain",
            variant=rng.randrange(10_000),
        )
        for item, colour, word in zip(scene.objects, colours, words)
    )
    return replace(scene, objects=objects)


def run_layers(
    model,
    batch: PackedBatch,
    visual: Tensor,
    reading: ReadingLayers | None = None,
    taps: Collection[int] = (),
    policy: Tensor | None = None,
) -> tuple[dict[int, Tensor], Tensor]:
    """Hidden states of the text blocks after so many layers as `taps` names, and at the end, each (n, text, width).

    Without `reading`, logits are those of the stock model (a test compares them). `policy` (n, visual) holds 1 for
    visual tokens that are there and 0 for those that are not; its gradient says what text would gain from each.
    """
    language = model.model.language_model
    embed = language.embed_tokens
    n, front, start = len(batch.text), len(batch.prefix), len(batch.prefix) + visual.shape[1]
    hidden = torch.cat([embed(batch.prefix).expand(n, -1, -1), visual, embed(batch.text)], dim=1)
    rotary = language.rotary_emb(hidden, position_ids=batch.positions)
    tapped: dict[int, Tensor] = {}
    for number, layer in enumerate(language.layers):
        sources = reading.sources(number, n) if reading else None
        hidden = hidden + _attend(layer, hidden, rotary, batch.mask, slice(front, start), sources, policy)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        if number + 1 in taps:
            tapped[number + 1] = hidden[:, start:]
    return tapped, hidden[:, start:]


def _attend(
    layer, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, image: slice,
    sources: tuple[Tensor, Tensor] | None, policy: Tensor | None,
) -> Tensor:  # fmt: skip
    """The attention half of a decoder layer; text rows see the visual keys and values of the rows `sources`."""
    attention = layer.self_attn
    inputs = layer.input_layernorm(hidden)
    query, key, value = (
        projection(inputs).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    attend, stop = nn.functional.scaled_dot_product_attention, image.stop
    first = query[:, :, :stop], key[:, :, :stop], value[:, :, :stop]
    if policy is None:
        before = attend(*first, is_causal=True)
    else:
        weights = nn.functional.pad(policy, (image.start, 0), value=1.0)
        there = (weights[:, None, None] > 0).expand(-1, 1, stop, -1).tril()
        itself = torch.eye(stop, dtype=torch.bool, device=hidden.device)
        before = attend(*first, attn_mask=there | itself)
    if sources is not None:
        key, value = (
            torch.cat([own[:, :, : image.start], own[rows][:, :, image], own[:, :, stop:]], dim=2)
            for own, rows in zip((key, value), sources)
        )
    if policy is None:
        text = attend(query[:, :, stop:], key, value, attn_mask=mask)
    else:
        weights = nn.functional.pad(weights, (0, key.shape[2] - stop), value=1.0)
        text = attend_by_policy(query[:, :, stop:], key, value, mask, weights[:, None, None])
    return attention.o_proj(torch.cat([before, text], dim=2).transpose(1, 2).flatten(2))


def attend_by_policy(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, policy: Tensor) -> Tensor:
    """Attention in which every key's weight before normalisation is multiplied by its `policy` (0: it is not there).

    Parameters
    ----------
    query, key, value : Tensor (n, heads, rows, width), (n, heads, columns, width), the same
    mask : BoolTensor or None
    policy : Tensor, broadcast against (n, heads, rows, columns)
    """
    logits = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    seen = policy > 0 if mask is None else mask & (policy > 0)
    highest = logits.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True).detach()
    # Keys that are not there keep a gradient; bounded, since their logits may lie above all the others.
    weights = (logits - highest).clamp(max=10).exp() * policy
    if mask is not None:
        weights = weights * mask
    return (weights / weights.sum(-1, keepdim=True)) @ value
