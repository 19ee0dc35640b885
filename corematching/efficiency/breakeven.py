"""After how many decode steps gathering core neurons has repaid itself, measured."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from corematching import kernels
from corematching.efficiency.latency import clock
from corematching.engine.ffn import MaskedFFN, SlicedFFN, neuron_major


@dataclass(frozen=True)
class BreakEven:
    """Medians in seconds, one FFN."""

    in_place: bool
    """Whether a kernel can read chosen rows where they lie; else the step held against gathering is dense."""
    before: float
    """One step before gathering."""
    after: float
    """One step on gathered rows."""
    gather: float

    @property
    def steps(self) -> float:
        """Decode steps that repay the gathering; infinite if a step on gathered rows is no faster."""
        saved = self.before - self.after
        return self.gather / saved if saved > 0 else float("inf")

    def __str__(self) -> str:
        gather, before, after = (f"{1e3 * value:.2f} ms" for value in (self.gather, self.before, self.after))
        kind = "rows read in place" if self.in_place else "dense step"
        end = "never repaid" if self.steps == float("inf") else f"repaid after {self.steps:.1f} steps"
        return f"{kind} {before}, rows gathered {after}, gathering {gather}: {end}"


def measure_break_even(mlp: Any, keep: float, repeats: int = 9) -> BreakEven:
    """Measure one FFN of a model.

    Parameters
    ----------
    mlp
        A gated FFN of the model; unchanged afterwards.
    keep
        Kept fraction of its width.
    """
    weight = mlp.gate_proj.weight
    width, hidden = weight.shape
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(width, generator=generator)[: max(1, int(width * keep))].sort().values.to(weight.device)
    x = torch.randn(1, 1, hidden, generator=generator).to(weight.device, weight.dtype)
    restore = neuron_major(mlp)
    times: dict[str, list[float]] = {"before": [], "after": [], "gather": []}
    try:
        with torch.inference_mode():
            in_place = kernels.usable(mlp, x)
            before = SlicedFFN(mlp, index) if in_place else MaskedFFN(mlp, index[None])
            after = SlicedFFN(mlp, index, copied=True)
            work = {"before": lambda: before(x), "after": lambda: after(x), "gather": after.gather}
            for repeat in range(repeats + 1):
                for name, run in work.items():
                    start = clock(weight.device)
                    run()
                    if repeat:  # the first turn touches memory for the first time
                        times[name].append(clock(weight.device) - start)
    finally:
        restore()
    return BreakEven(in_place, **{name: median(values) for name, values in times.items()})
