"""What computing chosen neurons costs on the machine at hand, way by way, and which way follows."""

from __future__ import annotations

from typing import Any

from corematching import kernels
from corematching.engine.ffn import neuron_major, sliceable
from corematching.engine.ways import by_rule, measured


def measured_ways(mlp: Any, keep: float) -> str:
    """Measure one FFN of a model anew; unchanged afterwards.

    Parameters
    ----------
    keep
        Kept fraction of its width.

    Returns
    -------
    str
        Milliseconds of every way and the plan; the rule that holds where nothing is measured (GPUs, FFNs in the cache).
    """
    count = max(1, int(len(mlp.gate_proj.weight) * keep))
    restore = neuron_major(mlp)
    try:
        if mlp.gate_proj.weight.device.type != "cpu" or kernels.fits_cache(mlp) or not sliceable(mlp):
            return f"{by_rule(mlp, count)}, by rule"
        return str(measured(mlp, count, again=True))
    finally:
        restore()
