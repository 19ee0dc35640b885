"""Which way a chosen-neuron FFN is computed on a CPU: measured once per machine, type and shape, then decided.

Rows can be read where they lie, by the compiled kernel ("native") or by torch's sparse operators ("in_place"); they can
be copied together once and then read like a smaller dense FFN ("gathered"); or the FFN is computed whole with unchosen
activations zeroed ("masked"). Which is fastest differs from processor to processor: on some, torch reads rows in place
as fast as gathered ones, on others at half their rate.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from corematching import files, kernels
from corematching.errors import UserError

WAYS = ("auto", "native", "in_place", "gathered", "masked")
WORTH_MEASURING = 2**26
"""Bytes of an FFN from which measuring it (half a second) is worth the while; smaller ones take a way by rule."""
GATHER_COST = 1.7
"""What gathering costs by that rule, per kept share in dense steps: a byte is read and written, in random order."""
ROUNDS = 5
STEPS = 20
"""Kept shares are measured in steps of a twentieth."""
SLACK = 0.97
"""Gathered rows must save more than this measurement can scatter by."""


@dataclass(frozen=True)
class Timings:
    """Medians in seconds of one FFN and one token; None: the machine cannot."""

    masked: float
    """The whole FFN, which is also the dense step."""
    gathered: float
    """A step on gathered rows."""
    gather: float
    """Copying the rows together."""
    in_place: float | None = None
    native: float | None = None

    def __str__(self) -> str:
        steps = {"dense": self.masked, "native": self.native, "in place": self.in_place, "gathered": self.gathered}
        told = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in steps.items() if value is not None)
        return f"{told}, gathering {1e3 * self.gather:.2f} ms: {decide(self)}"


@dataclass(frozen=True)
class Plan:
    """How the decode steps of an answer compute an FFN."""

    before: str
    """The way until rows are gathered: "native", "in_place" or "masked"."""
    gather_after: int | None = None
    """Steps after which rows are gathered; None: never."""
    repaid_after: int = 0
    """Further steps that repay it: nothing is gathered if fewer are known to be left."""

    def __str__(self) -> str:
        if self.gather_after is None:
            return f"{self.before} throughout"
        when = f"after {self.gather_after} steps" if self.gather_after else "at once"
        return f"gathered {when}" + (f", {self.before} until then" if self.gather_after else "")


def decide(timings: Timings) -> Plan:
    """The plan that is never slower than dense, whatever the answer's length, and fastest for long answers.

    Rows are gathered once the steps so far would have repaid it (a longer answer is then expected), and once what was
    saved over dense pays for it, so that an answer may end at any token. Where nothing reads rows in place nothing is
    saved before gathering, and an answer that ends just after it is slower than dense by the gathering.
    """
    steps = {"native": timings.native, "in_place": timings.in_place, "masked": timings.masked}
    known = {way: seconds for way, seconds in steps.items() if seconds is not None}
    before = min(known, key=lambda way: known[way])
    saved = known[before] - timings.gathered
    if timings.gathered >= SLACK * known[before]:
        return Plan(before)
    repaid = math.ceil(timings.gather / saved)
    ahead = timings.masked - known[before]
    safe = math.ceil(timings.gather / ahead) if ahead > 0 else 0
    return Plan(before, max(repaid, safe), repaid)


def plan_for(mlp: Any, count: int, way: str = "auto") -> Plan:
    """How to compute one prompt's chosen neurons, so many, of an FFN.

    Raises
    ------
    UserError
        For an unknown way, or one that this machine or FFN does not have.
    """
    possible = kernels.ways(mlp)
    if way == "gathered":
        return Plan("masked", 0)
    if way == "masked" or way in possible:
        return Plan(way)
    if way != "auto":
        have = ", ".join(("auto", *possible, "gathered", "masked"))
        raise UserError(f"ffn={way!r} is not possible here: choose from {have}")
    if mlp.gate_proj.weight.device.type == "cuda":
        return Plan(possible[0]) if possible else Plan("masked", 0)
    if _bytes(mlp) < WORTH_MEASURING or not mlp.down_proj.weight.t().is_contiguous():
        return by_rule(mlp, count)
    return decide(measured(mlp, count))


def by_rule(mlp: Any, count: int, single: bool = True) -> Plan:
    """Without measuring: in place where torch can, at once where the FFN sits in the cache, else when it repays.

    Parameters
    ----------
    single
        Whether one token is computed at a time, which is all that torch's operators take.
    """
    if single and kernels.covers(mlp):
        return Plan("in_place")
    if mlp.gate_proj.weight.device.type == "cuda" or kernels.fits_cache(mlp):
        return Plan("masked", 0)
    steps = round(steps_to_repay(count / len(mlp.gate_proj.weight)))
    return Plan("masked", steps, steps)


def steps_to_repay(share: float) -> float:
    """Decode steps whose savings pay for gathering a share of an FFN, by rule."""
    return GATHER_COST * share / (1 - share) if share < 1 else math.inf


def grouping_pays(mlp: Any, count: int, tokens: int) -> bool:
    """Whether a batch whose samples chose different neurons is faster over the union of so many than whole."""
    if not kernels.covers(mlp, "native") or _bytes(mlp) < WORTH_MEASURING or tokens > kernels.native.MOST_TOKENS:
        return False
    found = measured(mlp, count, tokens=tokens)
    return found.native is not None and found.native < found.masked


def measured(mlp: Any, count: int, again: bool = False, tokens: int = 1) -> Timings:
    """Timings for about so many neurons of an FFN like this: from an earlier process on such a machine, else measured.

    Parameters
    ----------
    mlp
        A gated FFN with neuron-major down weight.
    again
        Measure even if it is known.
    tokens
        Tokens of a step: samples of a batch.
    """
    width = len(mlp.gate_proj.weight)
    count = max(1, round(STEPS * count / width)) * width // STEPS  # methods may choose another number for every token
    path, key = files.cache_home() / "ffn_ways.json", _key(mlp, count, tokens)
    known = _read(path)
    if again or key not in known:
        known[key] = measure(mlp, count, tokens)
        _read.cache_clear()
        files.write(path, json.dumps({name: asdict(found) for name, found in known.items()}, indent=1) + "\n")
    return known[key]


@cache
def _read(path: Path) -> dict[str, Timings]:
    """What was measured before; nothing if the file is not there or not to be read."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {key: Timings(**values) for key, values in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _key(mlp: Any, count: int, tokens: int) -> str:
    weight = mlp.gate_proj.weight
    shape = f"{count} of {weight.shape[0]} x {weight.shape[1]}"
    machine = f"{files.cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    dtype, kernel = str(weight.dtype).removeprefix("torch."), "+".join(kernels.ways(mlp)) or "no kernel"
    return f"{machine}, {dtype}, {shape}, {kernel}" + (f", {tokens} tokens" if tokens > 1 else "")


def measure(mlp: Any, count: int, tokens: int = 1) -> Timings:
    """Time the ways by turns, on one FFN and random neurons; the first turn touches memory and is discarded."""
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.t()
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(len(gate), generator=generator)[:count].sort().values
    with torch.inference_mode():
        x = torch.randn(tokens, 1, gate.shape[1], generator=generator).to(gate.dtype)
        rows = [torch.cat([gate[index], up[index]]), down[index]]

        def gather() -> None:
            torch.index_select(gate, 0, index, out=rows[0][:count])
            torch.index_select(up, 0, index, out=rows[0][count:])
            torch.index_select(down, 0, index, out=rows[1])

        def gathered() -> Tensor:
            one, two = linear(x, rows[0]).chunk(2, dim=-1)
            return (mlp.act_fn(one) * two) @ rows[1]

        work: dict[str, Callable[[], Any]] = {"masked": lambda: mlp(x), "gather": gather, "gathered": gathered}
        for way in (way for way in kernels.ways(mlp) if kernels.usable(mlp, x, way)):
            work[way] = partial(kernels.chosen_ffn, mlp, index, x, way)
        times: dict[str, list[float]] = {name: [] for name in work}
        for turn in range(ROUNDS + 1):
            for name, run in work.items():
                start = time.perf_counter()
                run()
                if turn:
                    times[name].append(time.perf_counter() - start)
    return Timings(**{name: median(values) for name, values in times.items()})


def _bytes(mlp: Any) -> int:
    weight = mlp.gate_proj.weight
    return 3 * weight.numel() * weight.element_size()
