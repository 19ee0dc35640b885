"""What tables show beside scores: what each column is called, in which unit, with how many digits. Everywhere.

Times are medians in milliseconds; shares are of a measured peak. Bytes are decimal (1 MB = 10^6 bytes), FLOPs count 2 per
multiply-add.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """One column of numbers.

    Attributes
    ----------
    key
        Field that it is read from: of a trace summary, or of an efficiency row (``bench``).
    name
        Title in the tables of a run; other tables write it with a capital.
    short
        Title where there is little room.
    factor
        The stored value times this is shown.
    digits
        Decimals; significant digits if `significant`.
    better
        "higher" or "lower" where numbers compete.
    """

    key: str
    name: str
    short: str = ""
    factor: float = 1.0
    digits: int = 1
    significant: bool = False
    better: str = ""

    @property
    def title(self) -> str:
        """The name with a capital."""
        return self.name[:1].upper() + self.name[1:]

    def text(self, value: float | None) -> str | None:
        """A stored value as every table shows it; None if there is none."""
        if value is None or not math.isfinite(value):
            return None
        shown = self.factor * value
        digits = self.digits
        if self.significant and shown:
            digits = max(0, digits - 1 - math.floor(math.log10(abs(shown))))
        return f"{shown:.{digits}f}"


SHARE = Quantity("share", "% of dense", "%dense", better="higher")
TOKENS = Quantity("visual_tokens_per_layer", "tokens/layer", "tok/lay")
NEURONS = Quantity("neurons_by_layer", "neurons/layer", "neurons", digits=0)
KV = Quantity("kv_bytes", "KV MB", "KVMB", 1e-6, 2)
FLOPS = Quantity("flops_total", "GFLOPs", "GFLOPs", 1e-9, 3, significant=True)
ANSWER = Quantity("generated_tokens", "tokens/answer", "tok/ans")
CAPPED = Quantity("capped_answers", "hit the cap", "capped", digits=0)

#: Beside the scores of an accuracy table, in this order.
COSTS = (TOKENS, KV, FLOPS)
ANSWERS = (ANSWER, CAPPED)

#: Of an efficiency table, in this order.
TIMES = (
    Quantity("prefill_ms", "prefill ms", "prefill", better="lower"),
    Quantity("decode_ms_per_token", "decode ms/token", "decode", digits=2, better="lower"),
    Quantity("end_to_end_ms", "end to end ms", "all ms", better="lower"),
)
RATE = Quantity("tokens_per_s", "tokens/s", "tok/s", digits=1, better="higher")
SPEEDUP = Quantity("paired_speedup", "speed-up", "speedup", digits=2, better="higher")
PREFILL_SPEEDUP = Quantity("paired_prefill_speedup", "prefill speed-up", "pre x", digits=2, better="higher")
DECODE_SPEEDUP = Quantity("paired_decode_speedup", "decode speed-up", "dec x", digits=2, better="higher")
FLOPS_RATIO = Quantity("flops_ratio", "FLOPs, dense / own", "FLOPs x", digits=2, better="higher")
KV_RATIO = Quantity("kv_ratio", "KV, dense / own", "KV x", digits=2, better="higher")
EFFICIENCY = (
    *TIMES,
    RATE,
    SPEEDUP,
    PREFILL_SPEEDUP,
    DECODE_SPEEDUP,
    Quantity("flops", "TFLOPs", "TFLOPs", 1e-12, 3, significant=True),
    FLOPS_RATIO,
    Quantity("overhead_ms", "overhead ms", "overh.", digits=2),
    Quantity("peak_memory_bytes", "peak GB", "peakGB", 1e-9, 2),
    Quantity("kv_bytes", "KV MB", "KVMB", 1e-6, 1, better="lower"),
    KV_RATIO,
    Quantity("decode_gb_per_s", "GB/s"),
    Quantity("bandwidth_share", "% of GB/s", "%GB/s", 100.0, 0),
    Quantity("prefill_tflop_per_s", "TFLOP/s", digits=3),
    Quantity("flops_share", "% of FLOP/s", "%FLOP/s", 100.0, 0),
    Quantity("predicted_over_measured", "predicted / measured", "pred/meas", digits=2),
    Quantity("prefill_predicted_over_measured", "of prefill", "pre", digits=2),
    Quantity("decode_predicted_over_measured", "of decode", "dec", digits=2),
    Quantity("calibrated_over_measured", "calibrated / measured", "cal/meas", digits=2),
    Quantity("prefill_calibrated_over_measured", "of prefill", "pre", digits=2),
    Quantity("decode_calibrated_over_measured", "of decode", "dec", digits=2),
    Quantity("repeats", "pairs", digits=0),
)


def capped_text(capped: float | None, answers: float | None) -> str | None:
    """How many answers were cut at the most tokens they may have, such as ``4 of 8``; None if nobody counted."""
    if capped is None or answers is None or not (math.isfinite(capped) and math.isfinite(answers)):
        return None
    return f"{capped:.0f} of {answers:.0f}"


def runaway_note(cells: Sequence[tuple[str, float, float, float]]) -> str:
    """The warning about answers that never ended by themselves; empty if there are none.

    Parameters
    ----------
    cells
        What the cell is called, answers that hit the cap, all answers, and the cap in tokens.
    """
    worst = sorted((cell for cell in cells if cell[1] > 0), key=lambda cell: -cell[1] / cell[2])
    if not worst:
        return ""
    told = ", ".join(f"{name} {capped:.0f} of {answers:.0f} (cap {cap:.0f})" for name, capped, answers, cap in worst[:6])
    more = f", and {len(worst) - 6} cells more" if len(worst) > 6 else ""
    return f"Answers that ran into the cap on new tokens instead of ending: {told}{more}."
