"""The vision tower, run block by block when a method acts inside it or at its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from corematching.engine.clip import instructions, load_clip_text
from corematching.engine.tower_drop import TowerPass, dropping_pass
from corematching.engine.views import Ledger, Prompt
from corematching.errors import UserError
from corematching.methods.base import Merge, Replace, VisionBlocks, VisionDrop, VisionOutput
from corematching.methods.selection import tokens_at
from corematching.models.families import Family


@dataclass
class Block:
    """See :class:`corematching.methods.views.BlockView`."""

    layer: int
    hidden: Tensor
    keys: Tensor
    sizes: Tensor
    origin: Tensor
    ledger: Ledger

    def spend(self, flops: float | Sequence[float]) -> None:
        self.ledger.spend(flops)


class Remembered(Protocol):
    """States of the tower from earlier passes over the same images."""

    def get(self, index: int) -> Tensor | None:
        """State ``index`` [N, T, d], None if it is not known."""

    def put(self, index: int, states: Tensor) -> None:
        """Remember a state."""


class States(Sequence[Tensor]):
    """Hidden states of a tower, each one made when it is asked for.

    Parameters
    ----------
    make
        Gives state ``index``.
    count
        How many there are.
    """

    def __init__(self, make: Callable[[int], Tensor], count: int) -> None:
        self._make, self._count = make, count
        self._made: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        index = range(self._count)[index]
        if index not in self._made:
            self._made[index] = self._make(index)
        return self._made[index]


@dataclass
class TowerRun:
    """One pass of the tower over N images, with what later stages may ask about it.

    Also the :class:`corematching.methods.views.VisionView` handed to a :class:`VisionOutput` stage.
    """

    tower: nn.Module
    projector: nn.Module
    states: Sequence[Tensor]
    """hidden_states as transformers counts them: input of layer 0, then the output of every layer."""
    origin: Tensor
    """Long [N, T]: tower position of each token at the feature layer ([CLS] is 0, padding -1)."""
    feature_index: int
    skip_cls: bool
    grid: tuple[int, int]
    attention_tokens: list[list[int]]
    """Per block: tokens of every image that enter its attention."""
    mlp_tokens: list[list[int]]
    ledger: Ledger
    """Overhead per image, then (from :meth:`book` on) per batch row."""
    counts: list[int] | None = None
    """Tokens of every image at the feature layer, if patches left on the way there; states are padded at the end."""
    model_path: str = ""
    """Where the whole model came from: its tokenizer lies there."""
    prompt: Prompt | None = None
    images: Sequence[Sequence[int]] = field(default_factory=list)
    """The images of each batch row; rows of one prompt's beams share them."""
    replaced: tuple[Replace, Replace] | None = None
    """What became of the features, per image and per sample, once booked; None when nothing was reduced."""
    _keys: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _projected: Tensor | None = field(default=None, repr=False)

    @property
    def merged(self) -> bool:
        """Whether tokens merged on the way to the feature layer."""
        return self.counts is None and self.origin.shape[1] != self.attention_tokens[0][0]

    @property
    def features(self) -> Tensor:
        return self.states[self.feature_index][:, int(self.skip_cls) :]

    @property
    def cls(self) -> Tensor:
        return self.states[self.feature_index][:, 0]

    def hidden(self, index: int) -> Tensor:
        return self.states[index]

    def _layer(self, layer: int) -> tuple[Any, Tensor]:
        layers: Any = self.tower.encoder.layers  # type: ignore[union-attr]
        layer %= len(layers)
        return layers[layer], layers[layer].layer_norm1(self.states[layer])

    def keys(self, layer: int) -> Tensor:
        if layer not in self._keys:
            block, normed = self._layer(layer)
            attn = block.self_attn
            self.spend(2 * normed.shape[1] * attn.k_proj.in_features * attn.k_proj.out_features)
            self._keys[layer] = attn.k_proj(normed).unflatten(-1, (-1, attn.head_dim))
        return self._keys[layer]

    def cls_query(self, layer: int) -> Tensor:
        block, normed = self._layer(layer)
        attn = block.self_attn
        self.spend(2 * attn.q_proj.in_features * attn.q_proj.out_features)
        return attn.q_proj(normed[:, 0]).unflatten(-1, (-1, attn.head_dim))

    def cls_attention(self, layer: int) -> Tensor:
        query, keys = self.cls_query(layer)[:, :, None], self.keys(layer).transpose(1, 2)
        self.spend(2 * keys[0].numel())
        return ((query @ keys.transpose(2, 3)).float() * query.shape[-1] ** -0.5).softmax(-1)[:, :, 0, 1:]

    @property
    def projected(self) -> Tensor:
        if self._projected is None:
            self._projected = self.projector(self.features)
        return self._projected

    @property
    def projects_all(self) -> bool:
        """Whether every feature went through the projector, as it must for methods that choose after it."""
        return self._projected is not None

    def clip_embeddings(self, text_model: str) -> tuple[Tensor, list[Tensor]]:
        assert self.prompt is not None
        clip = load_clip_text(text_model, self.model_path, self.features.device, self.features.dtype)
        embeds = clip.patches(self.tower.post_layernorm(self.features), text_model)  # type: ignore[operator]
        of_rows = clip.texts(instructions(self.prompt, clip))
        rows = {image: row for row, own in enumerate(self.images) for image in own}
        self.spend(2 * embeds[0].numel() * self.features.shape[-1])
        pairs = zip(of_rows, self.images, strict=True)
        self.ledger.spend([clip.flops(len(text)) if own else 0.0 for text, own in pairs])
        return embeds, [of_rows[rows[image]] for image in range(len(embeds))]

    def of_images(self, images: Sequence[int]) -> TowerRun:
        """This pass for a list of its images, which may name one several times, as if nothing had been asked of it."""
        rows = torch.tensor(images, device=self.origin.device)
        everything = list(images) == list(range(len(self.origin)))
        states = self.states
        return replace(
            self,
            states=states if everything else States(lambda index: states[index][rows], len(states)),
            origin=self.origin[rows],
            attention_tokens=[[tokens[image] for image in images] for tokens in self.attention_tokens],
            mlp_tokens=[[tokens[image] for image in images] for tokens in self.mlp_tokens],
            counts=None if self.counts is None else [self.counts[image] for image in images],
            ledger=Ledger(len(images)),
            _keys={},
            _projected=None,
        )

    def book(self, prompt: Prompt, images: Sequence[Sequence[int]], ledger: Ledger) -> None:
        """Attach to a prompt whose rows have these images: from here on overhead counts as that prompt's."""
        self.prompt = prompt
        self.images = images
        spent, self.ledger = self.ledger.flops, ledger
        self.spend(spent)

    def spend(self, flops: float | Sequence[float]) -> None:
        per_image = flops if isinstance(flops, Sequence) else [flops] * len(self.features)
        self.ledger.spend([sum(per_image[image] for image in own) for own in self.images])


def run_tower(model: Any, family: Family, pixels: Tensor, blocks: VisionBlocks | VisionDrop | None) -> TowerRun:
    """Run the tower over ``pixels`` [N, 3, h, w]; tokens merge or leave inside it where ``blocks`` says so."""
    tower: Any = family.tower(model)
    config = model.config
    if not isinstance(config.vision_feature_layer, int):
        raise UserError(
            f"vision_feature_layer={config.vision_feature_layer} is not supported by vision-side methods: "
            "valid is one layer (an int)"
        )
    hidden, ledger = tower.pre_layrnorm(tower.embeddings(pixels)), Ledger(len(pixels))
    feature_index = config.vision_feature_layer % (len(tower.encoder.layers) + 1)
    layers = tower.encoder.layers
    if isinstance(blocks, VisionDrop):
        passed = dropping_pass(layers, hidden, blocks, ledger)
    else:
        passed = _merging_pass(layers, hidden, blocks, ledger)
    return TowerRun(
        tower=tower,
        projector=family.projector(model),
        states=passed.states,
        origin=passed.origins[feature_index],
        feature_index=feature_index,
        skip_cls=family.has_cls(config),
        grid=family.grid(config),
        attention_tokens=passed.attention_tokens,
        mlp_tokens=passed.mlp_tokens,
        counts=passed.mlp_tokens[feature_index - 1] if passed.dropped else None,
        ledger=ledger,
        model_path=config._name_or_path,
    )


def remembered_tower(model: Any, family: Family, pixels: Tensor, remembered: Remembered) -> TowerRun:
    """As :func:`run_tower` without stages, but the tower runs only for a state that is not remembered."""
    tower: Any = family.tower(model)
    images, layers = len(pixels), len(tower.encoder.layers)
    skip_cls, grid = family.has_cls(model.config), family.grid(model.config)
    length = grid[0] * grid[1] + int(skip_cls)
    ran: list[TowerRun] = []

    def state(index: int) -> Tensor:
        found = None if ran else remembered.get(index)
        if found is None:
            if not ran:
                ran.append(run_tower(model, family, pixels, None))
            found = ran[0].states[index]
            remembered.put(index, found)
        return found

    return TowerRun(
        tower=tower,
        projector=family.projector(model),
        states=States(state, layers + 1),
        origin=torch.arange(length, device=pixels.device).expand(images, -1),
        feature_index=model.config.vision_feature_layer % (layers + 1),
        skip_cls=skip_cls,
        grid=grid,
        attention_tokens=[[length] * images for _ in range(layers)],
        mlp_tokens=[[length] * images for _ in range(layers)],
        ledger=Ledger(images),
        model_path=model.config._name_or_path,
    )


def _merging_pass(layers: Any, hidden: Tensor, blocks: VisionBlocks | None, ledger: Ledger) -> TowerPass:
    """Run the blocks over [N, T, d]; without ``blocks`` as they are."""
    images, length = hidden.shape[:2]
    origin = torch.arange(length, device=hidden.device).expand(images, -1)
    state = Merge(hidden, torch.ones_like(hidden[..., :1], dtype=torch.float32), origin)
    ran = TowerPass([hidden], [origin], [], [])
    for index, layer in enumerate(layers):
        ran.attention_tokens.append([state.origin.shape[1]] * images)
        if blocks is None:
            state = replace(state, hidden=layer(state.hidden, None))
        else:
            state = _merging_block(layer, index, state, blocks, length, ledger)
        ran.mlp_tokens.append([state.origin.shape[1]] * images)
        ran.states.append(state.hidden)
        ran.origins.append(state.origin)
    return ran


def _merging_block(layer: Any, index: int, state: Merge, blocks: VisionBlocks, tokens: int, ledger: Ledger) -> Merge:
    """One tower block with merging between the attention residual and the MLP (ToMe, section 3).

    ``tokens`` is the length of the sequence before any merge.
    """
    attn = layer.self_attn
    # All sizes are 1 before the first merge: no bias then, so that merging nothing stays the dense computation.
    weigh = blocks.weigh_attention and state.hidden.shape[1] < tokens
    bias = state.sizes.log().to(state.hidden.dtype).transpose(1, 2)[:, None] if weigh else None
    captured: list[Tensor] = []
    handle = attn.k_proj.register_forward_hook(lambda module, inputs, output: captured.append(output))
    try:
        attended, _ = attn(hidden_states=layer.layer_norm1(state.hidden), attention_mask=bias)
    finally:
        handle.remove()
    hidden = state.hidden + attended
    keys = captured[0].unflatten(-1, (-1, attn.head_dim))
    merge = blocks.merge(Block(index, hidden, keys, state.sizes, state.origin, ledger))
    merged = replace(state, hidden=hidden) if merge is None else merge
    return replace(merged, hidden=merged.hidden + layer.mlp(layer.layer_norm2(merged.hidden)))


def image_decision(run: TowerRun, stage: VisionOutput | None) -> Replace | None:
    """What the tower's output becomes: per-image LLM tokens, or None when nothing was reduced.

    Returns
    -------
    Replace with ``hidden`` [N, K, d] (projected), ``origin`` and ``slot`` counting patches of the image.
    """
    skip = int(run.skip_cls)
    if stage is None:
        if run.counts is not None:
            origin, counts = run.origin[:, skip:] - skip, [count - skip for count in run.counts]
            return Replace(run.projector(run.features), origin, counts=counts)
        if not run.merged:
            return None
        origin = run.origin[:, skip:] - skip
        return Replace(run.projector(run.features), origin, slot=torch.zeros_like(origin))
    decision = stage.select(run)
    if decision is None:
        return None
    if isinstance(decision, Replace):
        hidden = decision.hidden if stage.projected else run.projector(decision.hidden)
        return Replace(hidden, decision.origin, decision.slot, decision.counts)
    counts = decision.counts if decision.counts is not None else decision.mask.sum(1).tolist()
    if min(counts) == decision.mask.shape[1]:
        return None
    # Kept patches first, ascending; rows with fewer are padded at the end.
    index = (~decision.mask).to(torch.int8).argsort(dim=1, stable=True)[:, : max(counts)]
    tokens = run.projected if run.projects_all else run.features
    chosen = tokens_at(tokens, index)
    return Replace(chosen if run.projects_all else run.projector(chosen), index, counts=counts)


def per_sample(decision: Replace, images: Sequence[Sequence[int]], image_tokens: int) -> Replace:
    """Turn per-image tokens into per-sample ones; samples may hold several images, beams repeat their sample's.

    Parameters
    ----------
    images
        The images of each batch row.
    image_tokens
        Visual tokens of one image before reduction.
    """
    counts = decision.counts or [decision.origin.shape[1]] * decision.origin.shape[0]
    slot = decision.origin if decision.slot is None else decision.slot
    rows = []
    for own in images:
        hidden = [decision.hidden[i, : counts[i]] for i in own]
        origin = [decision.origin[i, : counts[i]] for i in own]
        origin = [torch.where(part < 0, -1, part + k * image_tokens) for k, part in enumerate(origin)]
        slots = [slot[i, : counts[i]].clamp(min=0) + k * image_tokens for k, i in enumerate(own)]
        rows.append((hidden, origin, slots))
    width = max(sum(len(part) for part in origin) for _, origin, _ in rows)
    new = decision.hidden.new_zeros(len(rows), width, decision.hidden.shape[-1])
    new_origin = decision.origin.new_full((len(rows), width), -1)
    new_slot = torch.zeros_like(new_origin)
    kept = []
    for row, (hidden, origin, slots) in enumerate(rows):
        kept.append(sum(len(part) for part in origin))
        if kept[-1]:
            new[row, : kept[-1]] = torch.cat(hidden)
            new_origin[row, : kept[-1]] = torch.cat(origin)
            new_slot[row, : kept[-1]] = torch.cat(slots)
    return Replace(new, new_origin, new_slot, kept)


def stages_of(stages: Sequence[object]) -> tuple[VisionBlocks | VisionDrop | None, VisionOutput | None]:
    """The vision stages among a method's stages, inside the tower and at its output, at most one of each."""
    blocks = [stage for stage in stages if isinstance(stage, VisionBlocks | VisionDrop)]
    outputs = [stage for stage in stages if isinstance(stage, VisionOutput)]
    return (blocks[0] if blocks else None), (outputs[0] if outputs else None)
