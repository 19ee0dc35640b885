"""Decode steps that read only some rows of a KV cache: a method's choice before each step, carried out.

The attention modules of such layers are pointed at :class:`RowReader`, which sees what they are about to attend with:
the step's rotated query and the layer's whole cache. It asks the method, gathers the chosen rows and hands only those
to the attention kernel. Every sample is asked about alone, without its batch mates and their padding.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from corematching.errors import UserError
from corematching.methods.base import ChooseRows, KeepKV, ReadRows

if TYPE_CHECKING:
    from corematching.engine.session import Session
    from corematching.engine.state import PromptState
    from corematching.engine.views import AttentionSignals, Prompt

NAME = "corematching_rows"
"""Under which transformers finds the attention that asks a module's reader."""
KERNELS = ("sdpa", "eager")
Count = float | Tensor
"""Numbers that may still lie on the device."""


def _attend(module: Any, *args: Any, **kwargs: Any) -> Any:
    return module.row_reader(module, *args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)


# ---------------------------------------------------------------------------------------------------------- bookkeeping
@dataclass
class Step:
    """What one decode step read, per row of the batch as it was then."""

    rows: dict[int, list[Count]] = field(default_factory=dict)
    """Per layer and sample: rows read, on average over the KV heads."""
    mass: dict[int, list[Count]] = field(default_factory=dict)
    """Per layer and sample: share of dense attention on these rows; only while it is measured."""
    flops: list[float] = field(default_factory=list)
    """Per sample: what choosing took."""
    bytes: list[float] = field(default_factory=list)
    """Per sample: keys (and whatever else) read for choosing, apart from the rows attended to."""


@dataclass
class RowChoices:
    """What one turn's decode steps choose from and have read; per row of the batch as it is now."""

    starts: list[list[int]] = field(default_factory=list)
    """Per sample and layer: the cache row where its own ones begin (padding stands before)."""
    heads: dict[int, list[list[int]]] = field(default_factory=dict)
    """Of layers whose heads keep different numbers of rows, per sample: where each KV head's rows begin."""
    longest: dict[int, list[int]] = field(default_factory=dict)
    """Of the same, per sample of the prefill: rows of the longest head, to which the others are padded."""
    dropped: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """Of measured layers that dropped rows, per sample: keys [H_kv, n, hd] of all rows, and bool [H_kv, n] of those
    that stayed."""
    memory: list[dict[Any, Any]] = field(default_factory=list)
    """Per sample: what the method notes. Values are replaced, never written into."""
    steps: list[Step] = field(default_factory=list)

    def open_step(self) -> None:
        """A decode step begins."""
        batch = len(self.memory)
        self.steps.append(Step(flops=[0.0] * batch, bytes=[0.0] * batch))

    def note_heads(self, layer: int, valid: Tensor) -> list[int]:
        """A layer's KV heads keep different numbers of rows, bool [B, H_kv, K]: their rounded mean per sample."""
        counts = valid.sum(2).tolist()
        self.longest[layer] = [max(own) for own in counts]
        self.heads[layer] = [[valid.shape[2] - count for count in own] for own in counts]
        return [round(sum(own) / len(own)) for own in counts]

    def note_dropped(self, layer: int, keys: Tensor, decision: KeepKV, lengths: Sequence[int]) -> None:
        """A measured layer is about to keep some rows only of keys [B, H_kv, n, hd]."""
        stayed = torch.zeros(keys.shape[:3], dtype=torch.int8, device=keys.device)
        valid = torch.ones_like(decision.index) if decision.valid is None else decision.valid
        valid = valid if valid.dim() == 3 else valid[:, None].expand_as(decision.index)
        stayed = stayed.scatter_add(2, decision.index, valid.to(torch.int8)) > 0
        self.dropped[layer] = [
            (own[:, -length:], mark[:, -length:]) for own, mark, length in zip(keys, stayed, lengths, strict=True)
        ]

    def take(self, rows: Sequence[int]) -> None:
        """The batch is now made of these rows of what it was."""
        self.starts = [self.starts[row] for row in rows]
        self.memory = [dict(self.memory[row]) for row in rows]
        self.heads = {layer: [starts[row] for row in rows] for layer, starts in self.heads.items()}
        self.dropped = {layer: [own[row] for row in rows] for layer, own in self.dropped.items()}

    def snapshot(self) -> RowChoices:
        """As it is now, whatever comes."""
        return RowChoices(
            list(self.starts),
            dict(self.heads),
            dict(self.longest),
            dict(self.dropped),
            [dict(own) for own in self.memory],
            list(self.steps),
        )

    def fork(self) -> RowChoices:
        """For a copied KV cache: steps so far stay on this one's account."""
        twin = self.snapshot()
        twin.steps = []
        return twin

    def of_sample(self, row: int, depth: int) -> dict[str, list]:
        """A sample's part of the trace, as keyword arguments of :class:`~corematching.engine.trace.SampleTrace`."""
        own = [step for step in self.steps if row < len(step.flops)]

        def by_layer(name: str) -> list[list[float]]:
            parts = [getattr(step, name) for step in own]
            found = [[float(part[layer][row]) for part in parts if layer in part] for layer in range(depth)]
            return found if any(found) else []

        return {
            "rows_read": by_layer("rows"),
            "mass_read": by_layer("mass"),
            "choice_flops": [step.flops[row] for step in own],
            "choice_bytes": [step.bytes[row] for step in own],
        }


# ---------------------------------------------------------------------------------------------------------------- views
class RowSignals:
    """See :class:`corematching.methods.views.StepView`."""

    def __init__(
        self, layer: int, step: int, query: Tensor, keys: Tensor, values: Tensor, memory: dict, scaling: float
    ) -> None:
        self.layer, self.step, self.query, self.keys, self.values = layer, step, query, keys, values
        self.memory, self.scaling = memory, scaling
        self.spent = 0.0
        self.read = 0.0
        self.projected: Tensor | None = None
        self._cache: Any = None

    @property
    def unrotated_query(self) -> Tensor:
        if self.projected is None:
            raise ValueError("this stage did not ask for unrotated queries: declare ChooseRows(..., unrotated=True)")
        return self.projected

    @property
    def rows(self) -> int:
        return self.keys.shape[1]

    def attention(self, index: Tensor | None = None) -> Tensor:
        keys = self.keys if index is None else gather_rows(self.keys, index)
        logits = grouped_logits(self.query[:, None], keys, self.scaling)[:, 0]
        self.spend(2 * logits.numel() * keys.shape[2], keys.numel() * keys.element_size())
        return logits.softmax(-1)

    def keys_of(self, layer: int) -> Tensor:
        keys = self._cache.layers[layer].keys[self._row, :, self._start_of(layer) :]
        return keys[:, : self.rows]

    def attach(self, cache: Any, row: int, starts: list[int]) -> None:
        """Where other layers' keys are found."""
        self._cache, self._row, self._start_of = cache, row, starts.__getitem__

    def spend(self, flops: float, read: float = 0.0) -> None:
        self.spent += flops
        self.read += read


@dataclass
class PromptRowSignals:
    """See :class:`corematching.methods.views.PromptRowsView`."""

    layer: int
    keys: Tensor
    values: Tensor
    memory: dict
    _signals: AttentionSignals
    """Of this sample alone."""
    _prompt: Prompt
    _row: int

    @property
    def rows(self) -> int:
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        return self._signals.layout.lengths[0]

    @property
    def visual_mask(self) -> Tensor:
        own = self._signals.layout.visual_id[0, -self.length :] > -2
        return pad(own, (self.rows - self.length, 0))

    @property
    def question_length(self) -> int:
        return self._prompt.question_lengths[self._row]

    def queries(self, last: int) -> Tensor:
        width = self._signals.layout.valid.shape[1]
        return self._signals.queries(torch.arange(width - last, width, device=self.keys.device)[None])[0]

    def unrotated_queries(self, last: int) -> Tensor:
        width = self._signals.layout.valid.shape[1]
        rows = torch.arange(width - last, width, device=self.keys.device)[None]
        return self._signals.queries(rows, rotated=False)[0]

    def attention(self, last: int) -> Tensor:
        logits = grouped_logits(self.queries(last), self.keys, self._signals.attn.scaling)
        self.spend(2 * logits.numel() * self.keys.shape[2])
        index = torch.arange(self.rows, device=logits.device)
        hidden = index > index[-last:, None]
        return logits.masked_fill(hidden, torch.finfo(logits.dtype).min).softmax(-1)

    def spend(self, flops: float) -> None:
        self._signals.ledger.spend(flops)


def grouped_logits(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Attention logits in single precision: queries [H, R, hd] by keys [H_kv, n, hd] -> [H, R, n]."""
    grouped = queries.unflatten(0, (keys.shape[0], -1)).flatten(1, 2)
    logits = (grouped @ keys.transpose(1, 2)).float() * scaling
    return logits.unflatten(1, (-1, queries.shape[1])).flatten(0, 1)


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [H, n, hd] at long [H, K] -> [H, K, hd], copied row by row (``Tensor.gather`` goes number by number)."""
    heads, _, width = rows.shape
    head_stride, row_stride, one = rows.stride()
    if one != 1 or row_stride != width or head_stride % width:
        return rows.gather(1, index[..., None].expand(-1, -1, width))
    room = head_stride // width
    flat = rows.as_strided(((heads - 1) * room + rows.shape[1], width), (width, 1))
    places = index + torch.arange(0, heads * room, room, device=index.device)[:, None]
    return flat.index_select(0, places.flatten()).view(heads, -1, width)


# --------------------------------------------------------------------------------------------------------------- reader
class RowReader:
    """The attention of one decoder layer while a method chooses what it reads.

    Parameters
    ----------
    session
        The installed method's session.
    layer
        The decoder layer.
    stage
        How rows are chosen; None where heads only keep different numbers of rows.
    kernel
        The model's attention implementation.
    """

    def __init__(self, session: Session, layer: int, stage: ChooseRows | None, kernel: str) -> None:
        self.session, self.layer, self.stage, self.kernel = session, layer, stage, kernel
        self.projected: Tensor | None = None
        """What the query projection gave last, if the stage asks for it."""

    def note_projected(self, module: Any, args: tuple, output: Tensor) -> None:
        """Forward hook of the query projection."""
        self.projected = output if self.session.active is not None else None

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with query [B, H, R, hd] to keys and values [B, H_kv, n, hd]."""
        state = self.session.active
        choices = state.rows if state is not None else None
        if choices is None:
            return self._kernel(module)(module, query, key, value, mask, **kwargs)
        decisions: list[ReadRows | None] = [None] * len(query)
        if self.stage is not None:
            decisions = [self._ask(choices, row, query, key, value, kwargs["scaling"]) for row in range(len(query))]
            choices.steps[-1].rows[self.layer] = [
                key.shape[2] - own[self.layer] if decision is None else _rows_read(decision)
                for decision, own in zip(decisions, choices.starts, strict=True)
            ]
        if self.layer in self.session.measured:
            choices.steps[-1].mass[self.layer] = [
                self._mass(decision, choices, row, query, key, kwargs["scaling"])
                for row, decision in enumerate(decisions)
            ]
        if self.layer in choices.heads:
            return self._ragged(query, key, value, choices, kwargs["scaling"]), None
        if all(decision is None for decision in decisions):
            return self._kernel(module)(module, query, key, value, mask, **kwargs)
        if any(decision is not None and not isinstance(decision.index, Tensor) for decision in decisions):
            parts = [
                self._by_head(query[row], *self._gathered(decision, choices, row, key, value), kwargs["scaling"])
                for row, decision in enumerate(decisions)
            ]
            return torch.stack(parts), None
        gathered = [self._gathered(decision, choices, row, key, value) for row, decision in enumerate(decisions)]
        keys, values, mask = _batched(gathered)
        return self._kernel(module)(module, query, keys, values, mask, **kwargs)

    def _kernel(self, module: Any) -> Any:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.kernel, eager)

    def _ask(self, choices: RowChoices, row: int, query: Tensor, key: Tensor, value: Tensor, scaling: float):
        assert self.stage is not None
        start, step = choices.starts[row][self.layer], len(choices.steps) - 1
        view = RowSignals(
            self.layer, step, query[row, :, 0], key[row, :, start:], value[row, :, start:], choices.memory[row], scaling
        )
        view.attach(self.session.decoding_cache, row, choices.starts[row])
        if self.projected is not None:
            heads = self.projected[row, -1].unflatten(-1, query[row, :, 0].shape)
            norm = getattr(self.session.decoder.layers[self.layer].self_attn, "q_norm", None)
            view.projected = heads if norm is None else norm(heads)
        decision = self.stage.choose(view)
        choices.steps[-1].flops[row] += view.spent
        choices.steps[-1].bytes[row] += view.read
        return decision

    def _gathered(
        self, decision: ReadRows | None, choices: RowChoices, row: int, key: Tensor, value: Tensor
    ) -> tuple[Any, Any]:
        """One sample's keys and values to attend to, [H_kv, K, hd] each, or lists of [K_h, hd] by KV head."""
        start = choices.starts[row][self.layer]
        keys, values = key[row, :, start:], value[row, :, start:]
        if decision is None:
            return keys, values
        if isinstance(decision.index, Tensor):
            own = gather_rows(keys, decision.index) if decision.keys is None else decision.keys
            return own, gather_rows(values, decision.index)
        index = decision.index
        own_keys = decision.keys
        if own_keys is None:
            own_keys = [head.index_select(0, rows) for head, rows in zip(keys, index, strict=True)]
        return own_keys, [head.index_select(0, rows) for head, rows in zip(values, index, strict=True)]

    @staticmethod
    def _by_head(query: Tensor, keys: Any, values: Any, scaling: float) -> Tensor:
        """Attention [1, H, hd] of query [H, 1, hd] where every KV head has rows of its own number."""
        heads = query.unflatten(0, (len(keys), -1))[:, :, 0]
        parts = [
            scaled_dot_product_attention(own[None], k[None], v[None], scale=scaling)[0]
            for own, k, v in zip(heads, keys, values, strict=True)
        ]
        return torch.cat(parts)[None]

    def _ragged(self, query: Tensor, key: Tensor, value: Tensor, choices: RowChoices, scaling: float) -> Tensor:
        """Attention where a layer's heads keep different numbers of rows, each a stretch at the end of its own."""
        parts: list[Tensor] = []
        read: list[Count] = []
        for row, starts in enumerate(choices.heads[self.layer]):
            keys = [key[row, head, start:] for head, start in enumerate(starts)]
            values = [value[row, head, start:] for head, start in enumerate(starts)]
            parts.append(self._by_head(query[row], keys, values, scaling))
            read.append(sum(map(len, keys)) / len(keys))
        choices.steps[-1].rows[self.layer] = read
        return torch.stack(parts)

    def _mass(
        self, decision: ReadRows | None, choices: RowChoices, row: int, query: Tensor, key: Tensor, scaling: float
    ) -> Count:
        """Share of a sample's dense attention on the rows read, on average over query heads."""
        dropped = choices.dropped.get(self.layer)
        keys = key[row, :, choices.starts[row][self.layer] :]
        read = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
        if decision is not None:
            read.zero_()
            for head, rows in zip(read, decision.index, strict=True):
                head[rows] = True
        elif dropped is not None:
            every, stayed = dropped[row]
            decoded = len(choices.steps)
            keys = torch.cat([every, keys[:, -decoded:]], 1)
            read = torch.cat([stayed, read[:, -decoded:]], 1)
        else:
            return 1.0
        dense = grouped_logits(query[row], keys, scaling)[:, 0].softmax(-1)
        return (dense.unflatten(0, (len(read), -1)) * read[:, None]).sum(-1).mean()


def _rows_read(decision: ReadRows) -> float:
    if isinstance(decision.index, Tensor):
        return decision.index.shape[1]
    return sum(len(rows) for rows in decision.index) / len(decision.index)


def _batched(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values [B, H_kv, K, hd] of samples that read different numbers of rows; the mask hides the padding."""
    counts = [keys.shape[1] for keys, _ in parts]
    most = max(counts)
    keys, values = (
        torch.stack([pad(part, (0, 0, most - part.shape[1], 0)) for part in column])
        for column in zip(*parts, strict=True)
    )
    if min(counts) == most:
        return keys, values, None
    real = torch.arange(most, 0, -1, device=keys.device) <= torch.tensor(counts, device=keys.device)[:, None]
    mask = torch.zeros(real.shape, dtype=keys.dtype, device=keys.device)
    return keys, values, mask.masked_fill(~real, torch.finfo(keys.dtype).min)[:, None, None]


# --------------------------------------------------------------------------------------------------------- installation
def install_readers(session: Session) -> None:
    """Point the attention of the layers whose rows are chosen (or ragged) at readers of their own.

    Raises
    ------
    UserError
        For attention kernels that cannot be handed rows with a mask.
    """
    layers = sorted({*session.choose_rows, *session.ragged, *session.measured})
    kernel = session.decoder.config._attn_implementation
    if layers and kernel not in KERNELS:
        raise UserError(
            f"attention kernel {kernel!r} is not supported by methods that choose KV rows: choose from "
            f"{', '.join(KERNELS)}"
        )
    for layer in layers:
        attention = session.decoder.layers[layer].self_attn
        pointed = copy.copy(attention.config)
        pointed._attn_implementation_internal = NAME
        reader = RowReader(session, layer, session.choose_rows.get(layer), kernel)
        if reader.stage is not None and reader.stage.unrotated:
            session.hook(attention.q_proj.register_forward_hook(reader.note_projected))
        session.shadow(attention, "row_reader", reader)
        session.shadow(attention, "config", pointed)


# ------------------------------------------------------------------------------------------------------------ prefill
def open_choices(session: Session, state: PromptState) -> None:
    """A prompt's (or turn's) prefill begins: nothing is chosen yet."""
    if not session.chooses_rows:
        return
    batch = len(state.prompt.lengths)
    if state.past and state.past[0].rows:
        if session.ragged or session.measured:
            raise UserError(f"method {session.name!r} takes no later turns on a KV cache: give each prompt a new one")
        if batch > 1 or state.prompt.padded:
            raise UserError("later turns of a batch are not supported by methods that choose KV rows: one by one")
    state.rows = RowChoices(starts=[[] for _ in range(batch)], memory=[{} for _ in range(batch)])


def note_prompt(
    session: Session, layer: int, state: PromptState, cache_layer: Any, signals: AttentionSignals, prompt: Prompt
) -> None:
    """A layer's prefill is done: note where every sample's rows begin, and let the method look at them."""
    choices, stage = state.rows, session.choose_rows.get(layer)
    assert choices is not None
    for row, held in enumerate(state.kv_lengths[layer]):
        start = cache_layer.keys.shape[2] - held
        choices.starts[row].append(start)
        if stage is None or stage.begin is None:
            continue
        own = signals.of_sample(row)
        keys, values = cache_layer.keys[row, :, start:], cache_layer.values[row, :, start:]
        stage.begin(PromptRowSignals(layer, keys, values, choices.memory[row], own, prompt, row))
        state.ledger.spend_on(row, own.ledger.flops[0])
