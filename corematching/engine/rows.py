"""Decode steps that read only some rows of a KV cache: a method's choice before each step, carried out.

The attention modules of such layers are pointed at :class:`RowReader`, which sees what they are about to attend with:
the step's rotated query and the layer's whole cache. It asks the method, gathers the chosen rows and hands only those
to the attention kernel. Every sample is asked about alone, without its batch mates and their padding.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from corematching.engine.row_choices import Count, RowChoices
from corematching.errors import UserError
from corematching.methods.base import ChooseRows, ReadRows

if TYPE_CHECKING:
    from corematching.engine.session import Session
    from corematching.engine.state import PromptState
    from corematching.engine.views import AttentionSignals, Prompt

NAME = "corematching_rows"
"""Under which transformers finds the attention that asks a module's reader."""
KERNELS = ("sdpa", "eager")


def _attend(module: Any, *args: Any, **kwargs: Any) -> Any:
    return module.row_reader(module, *args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)


# ---------------------------------------------------------------------------------------------------------------- views
@dataclass
class RowSignals:
    """See :class:`corematching.methods.views.StepView`."""

    layer: int
    step: int
    query: Tensor
    keys: Tensor
    values: Tensor
    memory: dict
    scaling: float
    _projected: Tensor | None
    _cache: Any
    _row: int
    _starts: list[int]
    """Per layer: where the sample's rows begin in the cache."""
    spent: float = 0.0
    read: float = 0.0

    @property
    def unrotated_query(self) -> Tensor:
        if self._projected is None:
            raise ValueError("this stage did not ask for unrotated queries: declare ChooseRows(..., unrotated=True)")
        return self._projected

    @property
    def rows(self) -> int:
        return self.keys.shape[1]

    def attention(self, index: Tensor | None = None) -> Tensor:
        keys = self.keys if index is None else gather_rows(self.keys, index)
        logits = grouped_logits(self.query[:, None], keys, self.scaling)[:, 0]
        self.spend(2 * logits.numel() * keys.shape[2], keys.numel() * keys.element_size())
        return logits.softmax(-1)

    def keys_of(self, layer: int) -> Tensor:
        keys = self._cache.layers[layer].keys[self._row, :, self._starts[layer] :]
        return keys[:, : self.rows]

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

    def _ask(
        self, choices: RowChoices, row: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> ReadRows | None:
        assert self.stage is not None
        start, own = choices.starts[row][self.layer], query[row, :, 0]
        view = RowSignals(
            self.layer,
            len(choices.steps) - 1,
            own,
            key[row, :, start:],
            value[row, :, start:],
            choices.memory[row],
            scaling,
            self._unrotated(row, own.shape),
            self.session.decoding_cache,
            row,
            choices.starts[row],
        )
        decision = self.stage.choose(view)
        choices.steps[-1].flops[row] += view.spent
        choices.steps[-1].bytes[row] += view.read
        return decision

    def _unrotated(self, row: int, shape: torch.Size) -> Tensor | None:
        """A sample's query [H, hd] before rotation, if the stage asks for it."""
        if self.projected is None:
            return None
        heads = self.projected[row, -1].unflatten(-1, shape)
        norm = getattr(self.session.decoder.layers[self.layer].self_attn, "q_norm", None)
        return heads if norm is None else norm(heads)

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
