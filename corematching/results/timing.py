"""How rows of the efficiency road are marked, and when their numbers are no good for ranking."""

from __future__ import annotations

import math

LEAST_NOISE = 0.02
"""Dense against itself may be off 1 by this much however little its runs scatter."""


def prediction_note(from_layers: float | None) -> str:
    """How a row that was not measured is marked; from a slice of so many layers, if any."""
    return "predicted" + (f" from {from_layers:.0f} layers" if from_layers and from_layers > 0 else "")


def batch_note(batch: float | None) -> str:
    """How a row of several prompts answered together is marked; empty for a single one."""
    return f", batch {batch:.0f}" if batch and batch > 1 else ""


def engines_note(engine: str | None, dense_engine: str | None) -> str:
    """How a row is marked whose dense runs decoded with another engine; empty if they did not."""
    different = engine and dense_engine and engine != dense_engine
    return f", {engine} against {dense_engine} dense" if different else ""


def noise_warning(setting: str, speedup: float, quartiles: float | None) -> str:
    """What is wrong with a setting in which `dense_is_off`."""
    spread = f" ± {quartiles / 2:.2f}" if quartiles is not None and math.isfinite(quartiles) else ""
    return (
        f"{setting}: dense against itself is {speedup:.2f}{spread} instead of 1, more than its noise allows; "
        "nothing is ranked there. Measure again on an idle machine (force=true)."
    )


def dense_is_off(speedup: float | None, quartiles: float | None) -> bool:
    """Whether dense timed against itself is further from 1 than its own scatter explains.

    Parameters
    ----------
    speedup
        Median over pairs of dense time over dense time.
    quartiles
        Distance between the quartiles over pairs; half of it is what tables print behind ±.
    """
    if speedup is None or not math.isfinite(speedup):
        return False
    allowed = quartiles / 2 if quartiles is not None and math.isfinite(quartiles) else 0.0
    return abs(speedup - 1) > max(LEAST_NOISE, allowed)
