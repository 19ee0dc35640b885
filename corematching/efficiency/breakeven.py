"""After how many decode steps gathering core neurons has repaid itself, measured."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from corematching import kernels
from corematching.efficiency.latency import clock
from corematching.engine.ffn import MaskedFFN, Rows, SlicedFFN, neuron_major


@dataclass(frozen=True)
class BreakEven:
    """Medians in seconds, one FFN."""

    dense_step: float
    sliced_step: float
    gather: float

    @property
    def steps(self) -> float:
        """Decode steps that repay the gathering; infinite if a sliced step is no faster."""
        saved = self.dense_step - self.sliced_step
        return self.gather / saved if saved > 0 else float("inf")

    def __str__(self) -> str:
        times = (1e3 * value for value in (self.gather, self.dense_step, self.sliced_step))
        gather, dense, sliced = (f"{value:.2f} ms" for value in times)
        return f"gathering {gather}, dense step {dense}, sliced step {sliced}: repaid after {self.steps:.1f} steps"


def measure_break_even(mlp: Any, keep: float, repeats: int = 9) -> BreakEven | None:
    """Measure one FFN; None where a kernel gathers while it reads, so that there is nothing to repay.

    Parameters
    ----------
    mlp
        A gated FFN of the model.
    keep
        Kept fraction of its width.
    """
    weight = mlp.gate_proj.weight
    if kernels.available(weight.device):
        return None
    width, hidden = weight.shape
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(width, generator=generator)[: max(1, int(width * keep))].sort().values.to(weight.device)
    x = torch.randn(1, 1, hidden, generator=generator).to(weight.device, weight.dtype)
    restore = neuron_major(mlp)
    times: dict[str, list[float]] = {"dense": [], "sliced": [], "gather": []}
    try:
        with torch.inference_mode():
            masked = MaskedFFN(mlp, index[None])
            sliced = SlicedFFN(mlp, index, Rows.like(mlp, len(index)))
            sliced(x)  # touches the buffers' pages, as the first prompt of a run does
            for _ in range(repeats):
                for name, work in (("dense", masked), ("sliced", sliced)):
                    start = clock(weight.device)
                    work(x)
                    times[name].append(clock(weight.device) - start)
                assert sliced.rows is not None
                sliced.rows.owner = None
                start = clock(weight.device)
                sliced(x)
                times["gather"].append(clock(weight.device) - start)
    finally:
        restore()
    gather = max(0.0, median(times["gather"]) - median(times["sliced"]))
    return BreakEven(median(times["dense"]), median(times["sliced"]), gather)
