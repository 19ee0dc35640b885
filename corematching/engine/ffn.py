"""Decode-time FFNs that read chosen neurons only.

A neuron of a gated FFN is one row of the gate weight, one row of the up weight and one column of the down weight.
:func:`neuron_major` stores the down weight so that its columns are contiguous too; then choosing neurons means reading
whole rows, where they lie, inside the matrix-vector product (:mod:`corematching.kernels`), or gathering them once per
prompt into buffers that outlive it, when the answer is long enough to repay that: :mod:`corematching.engine.ways`
decides, on a CPU by measurement.

Rows may be read past the modules only where that gives what the modules compute: :func:`sliceable`. Under adapters,
quantisation or offloading the FFN is computed whole, through its modules, with unchosen activations zeroed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from corematching import kernels
from corematching.engine.ways import Plan, by_rule, grouping_pays, plan_for


def neuron_major(mlp: Any) -> Callable[[], None]:
    """Store the down weight neuron by neuron, in place; values and shapes stay the same.

    FFNs that sit in a CPU's cache are left alone: strided columns cost little there.

    Returns
    -------
    A function that restores the original storage order, and with it bit-identical results.
    """
    if is_streamed(mlp) or not sliceable(mlp):
        return lambda: None
    down = mlp.down_proj.weight
    if down.data.t().is_contiguous() or kernels.fits_cache(mlp):
        return lambda: None
    with torch.inference_mode(False), torch.no_grad():
        down.data = down.data.t().contiguous().t()

    def restore() -> None:
        with torch.inference_mode(False), torch.no_grad():
            down.data = down.data.contiguous()

    return restore


COLUMNS_AT_ONCE = 1024
"""Neurons whose down weights are found out at a time."""


@dataclass
class Rows:
    """Room for the gathered rows of one FFN, used by one prompt after another."""

    gate_up: Tensor
    """[2k, d]: k gate rows, then k up rows."""
    down: Tensor
    """[k, d]: rows of the transposed down weight."""
    owner: object = None
    """``key`` of the FFN whose neurons lie here now; the FFN itself would keep the room alive in a cycle."""

    @classmethod
    def like(cls, mlp: Any, count: int) -> Rows:
        weight = mlp.gate_proj.weight
        with torch.inference_mode(False):
            return cls(weight.new_empty(2 * count, weight.shape[1]), weight.new_empty(count, weight.shape[1]))


class SlicedFFN:
    """A gated FFN cut down to some neurons.

    Parameters
    ----------
    mlp
        Module with ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn`` (weights [I, d], [I, d], [d, I]).
    index
        Long [k]: neurons to keep.
    rows
        Where to gather them; own room if None. Another FFN may take the room over, then they are gathered again.
    plan
        The way to compute until rows are gathered, and when that is; None: in place where a kernel can, else gathered.
    copied
        Gather now: the whole weights are within reach for this moment only.
    """

    mode = "sliced"

    def __init__(
        self, mlp: Any, index: Tensor, rows: Rows | None = None, plan: Plan | None = None, copied: bool = False
    ) -> None:
        self.mlp = mlp
        self.index = index
        self.rows = rows
        self.key = object()
        self.plan = plan or Plan("in_place" if kernels.covers(mlp) else "masked", None if kernels.covers(mlp) else 0)
        self.copied = copied
        self.most_steps: int | None = None
        """The answer's most decode steps, where they are known: too few do not repay gathering."""
        self.steps = 0
        """Steps before rows were gathered."""
        self.masked_steps = 0
        self._masked: MaskedFFN | None = None
        self._gathers = False
        self._biases = tuple(
            None if linear.bias is None else linear.bias.index_select(0, index)
            for linear in (mlp.gate_proj, mlp.up_proj)
        )
        if copied:
            self.gather()

    def __call__(self, x: Tensor) -> Tensor:
        """[B, q, d] -> [B, q, d]."""
        if self._waits():
            way = self.plan.before
            if way == "masked":
                self.steps += x.shape[1]
                self.masked_steps += x.shape[1]
                self._masked = self._masked or MaskedFFN(self.mlp, self.index[None])
                return self._masked(x)
            if kernels.usable(self.mlp, x, way):
                self.steps += x.shape[1]
                return kernels.chosen_ffn(self.mlp, self.index, x, way)
        rows = self._gathered()
        gate, up = functional.linear(x, rows.gate_up).chunk(2, dim=-1)
        gate_bias, up_bias = self._biases
        gate = gate if gate_bias is None else gate + gate_bias
        up = up if up_bias is None else up + up_bias
        out = (self.mlp.act_fn(gate) * up) @ rows.down
        return out if self.mlp.down_proj.bias is None else out + self.mlp.down_proj.bias

    def take(self, rows: Tensor) -> None:
        """All samples of the batch share these neurons, whichever they are."""

    @property
    def capturable(self) -> bool:
        """Whether repeating its kernels for another prompt's neurons, copied into ``index`` or its rows, is enough."""
        return self.copied or kernels.covers(self.mlp)

    def check_rows(self) -> None:
        """Refuse to compute with another prompt's rows.

        Raises
        ------
        RuntimeError
            If copied rows were taken over; they cannot be gathered again.
        """
        if self.copied and (self.rows is None or self.rows.owner is not self.key):
            raise RuntimeError("another prompt took over the copied neurons: finish one answer before the next")

    def _waits(self) -> bool:
        """Whether this step is computed before rows are gathered, or nothing is."""
        if not self._gathers and not self.copied:
            after, most = self.plan.gather_after, self.most_steps
            left = float("inf") if most is None else most - self.steps
            self._gathers = after is not None and self.steps >= after and left >= self.plan.repaid_after
        return not (self._gathers or self.copied)

    def _gathered(self) -> Rows:
        if self.rows is None or self.rows.owner is not self.key:
            self.check_rows()
            self.gather()
        assert self.rows is not None
        return self.rows

    def gather(self) -> None:
        """Copy the neurons' rows into the room, its own if it was given none."""
        if self.rows is None:
            self.rows = Rows.like(self.mlp, len(self.index))
        rows, count = self.rows, len(self.index)
        with torch.no_grad():
            torch.index_select(self.mlp.gate_proj.weight, 0, self.index, out=rows.gate_up[:count])
            torch.index_select(self.mlp.up_proj.weight, 0, self.index, out=rows.gate_up[count:])
            torch.index_select(self.mlp.down_proj.weight.t(), 0, self.index, out=rows.down)
        rows.owner = self.key


class MaskedFFN:
    """The dense FFN, through its modules, with unchosen activations zeroed.

    Mathematically what :class:`SlicedFFN` computes for each sample, but nothing is saved. For batches whose samples
    chose different neurons (mode "masked") and for weights that cannot be sliced (mode "whole").

    Parameters
    ----------
    mlp
        Module with ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``.
    index
        Long [B, k]: each sample's neurons.
    """

    masked_steps = 0
    most_steps: int | None = None
    rows = None
    capturable = False

    def __init__(self, mlp: Any, index: Tensor, mode: str = "masked") -> None:
        self.mlp = mlp
        self.mode = mode
        width = mlp.gate_proj.out_features
        self.mask = torch.zeros(index.shape[0], 1, width, dtype=torch.bool, device=index.device)
        self.mask.scatter_(2, index[:, None], True)

    def __call__(self, x: Tensor) -> Tensor:
        """[B, q, d] -> [B, q, d]."""
        mlp = self.mlp
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) * self.mask)

    def take(self, rows: Tensor) -> None:
        """The batch is now made of these rows (long) of what it was."""
        self.mask = self.mask.index_select(0, rows.to(self.mask.device))

    def check_rows(self) -> None:
        """Has none."""


class GroupedFFN(MaskedFFN):
    """The same for a batch, computed over the neurons that any of its samples chose, read in place.

    The trace says "masked": what a sample costs here depends on its batch.
    """

    def __init__(self, mlp: Any, index: Tensor) -> None:
        super().__init__(mlp, index)
        self._find()

    def __call__(self, x: Tensor) -> Tensor:
        """[B, q, d] -> [B, q, d]."""
        if not kernels.usable(self.mlp, x, "native"):
            return super().__call__(x)
        chosen = self.chosen if x.shape[1] == 1 else self.chosen.repeat_interleave(x.shape[1], 0)
        return kernels.chosen_ffn(self.mlp, self.union, x, "native", chosen)

    def take(self, rows: Tensor) -> None:
        """The batch is now made of these rows (long) of what it was."""
        super().take(rows)
        self._find()

    def _find(self) -> None:
        self.union = self.mask[:, 0].any(0).nonzero()[:, 0]
        self.chosen = self.mask[:, 0].index_select(1, self.union)


@dataclass
class FFNBuilder:
    """Makes the decode FFNs of one installed method and keeps the room their rows are gathered into.

    Parameters
    ----------
    gather_after
        Overrides the plan: so many masked steps before gathering; None leaves it to ``way``.
    way
        One of :data:`corematching.engine.ways.WAYS`; "auto" decides by device, size and measurement.
    """

    gather_after: int | None = None
    way: str = "auto"
    _rows: dict[int, Rows] = field(default_factory=dict, repr=False)

    def __call__(self, mlp: Any, index: Tensor) -> SlicedFFN | MaskedFFN:
        """The FFN of one prompt for neuron sets [B, k]; sliced when every row (one sample, or its beams) agrees."""
        if not sliceable(mlp):
            return MaskedFFN(mlp, index, "whole")
        if not _rows_agree(index):
            union = 0 if is_streamed(mlp) or self.way != "auto" else len(index.unique())
            pays = union > 0 and grouping_pays(mlp, union, len(index))
            return GroupedFFN(mlp, index) if pays else MaskedFFN(mlp, index)
        if is_streamed(mlp):
            return SlicedFFN(mlp, index[0], self._room(mlp, index), copied=True)
        plan = self._plan(mlp, index)
        return SlicedFFN(mlp, index[0], self._room(mlp, index, plan), plan)

    def once(self, mlp: Any, index: Tensor) -> SlicedFFN | MaskedFFN:
        """The FFN of one single step, for methods that choose anew for every token."""
        if not sliceable(mlp):
            return MaskedFFN(mlp, index, "whole")
        if is_streamed(mlp) or not _rows_agree(index):
            return MaskedFFN(mlp, index)
        plan = self._plan(mlp, index)
        if plan.before != "masked" and plan.gather_after != 0:
            return SlicedFFN(mlp, index[0], None, Plan(plan.before))
        if plan.gather_after is None or plan.gather_after > 1:
            return MaskedFFN(mlp, index)
        return SlicedFFN(mlp, index[0], self._room(mlp, index, plan), Plan("masked", 0))

    def _plan(self, mlp: Any, index: Tensor) -> Plan:
        """How to compute rows (of one sample, or its beams) that agree."""
        if self.gather_after is not None:
            return Plan("masked", self.gather_after)
        if index.shape[0] > 1 and self.way == "auto" and not kernels.covers(mlp, "native"):
            return by_rule(mlp, index.shape[1], single=False)
        return plan_for(mlp, index.shape[1], self.way)

    def _room(self, mlp: Any, index: Tensor, plan: Plan | None = None) -> Rows | None:
        weight = mlp.gate_proj.weight
        short_lived = weight.device.type == "cuda" and kernels.available(weight.device) and not is_streamed(mlp)
        never = plan is not None and plan.gather_after is None
        if short_lived or never:  # rows of beams, say, need not outlive them on a GPU
            return None
        rows, count = self._rows.get(id(mlp)), index.shape[1]
        if rows is None or len(rows.down) != count:
            rows = self._rows[id(mlp)] = Rows.like(mlp, count)
        return rows


def sliceable(mlp: Any) -> bool:
    """Whether reading weight rows gives what an FFN's modules compute: plain resident linear layers, nothing around.

    Not so under adapters (PEFT), quantised linears, weights that accelerate loads when they are needed, tensor
    subclasses such as DTensor, parametrisations, and hooks of others that may change what goes in or comes out.
    """
    parts = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return all(_is_plain(linear) for linear in parts) and not any(map(_is_hooked, (*parts, mlp.act_fn)))


def _is_plain(linear: Any) -> bool:
    weight = getattr(linear, "weight", None)
    return (
        type(linear) is nn.Linear
        and "forward" not in vars(linear)
        and type(weight) is nn.Parameter
        and weight.is_floating_point()
        and weight.device.type != "meta"
    )


def _is_hooked(module: Any) -> bool:
    """Whether somebody else's hooks hang on a module."""
    hooks = [*getattr(module, "_forward_hooks", {}).values(), *getattr(module, "_forward_pre_hooks", {}).values()]
    return not all(_is_ours(hook) for hook in hooks)


def _is_ours(hook: Any) -> bool:
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("corematching.")


def down_weight(mlp: Any, like: Tensor) -> Tensor:
    """[d, I] what an FFN's down projection multiplies activations like these with.

    Its weight or, where that may not be read past the module, what comes out when one neuron at a time is active.
    """
    down = mlp.down_proj
    if sliceable(mlp):
        return down.weight
    width, columns = down.in_features, []
    for start in range(0, width, COLUMNS_AT_ONCE):
        neurons = torch.arange(start, min(start + COLUMNS_AT_ONCE, width), device=like.device)
        one_hot = like.new_zeros(1, len(neurons) + 1, width)
        one_hot[0, torch.arange(len(neurons)), neurons] = 1
        answers = down(one_hot)[0]
        columns.append(answers[:-1] - answers[-1])  # the last row is the bias, if there is one
    return torch.cat(columns).t()


def is_streamed(mlp: Any) -> bool:
    """Whether an FFN's weights are on the device only while they are used (:mod:`corematching.engine.offload`)."""
    return getattr(mlp, "streamed", False)


def _rows_agree(index: Tensor) -> bool:
    return index.shape[0] == 1 or bool((index == index[:1]).all())
