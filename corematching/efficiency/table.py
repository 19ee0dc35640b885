"""The table of an efficiency run, made from its stored records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from corematching.results.table import HOLE, RunTable, engines_note, prediction_note

_COLUMNS = {
    "prefill_ms": ("prefill ms", 1.0, 1),
    "decode_ms_per_token": ("decode ms/token", 1.0, 2),
    "end_to_end_ms": ("end to end ms", 1.0, 1),
    "paired_speedup": ("x dense", 1.0, 2),
    "overhead_ms": ("overhead ms", 1.0, 2),
    "peak_memory_bytes": ("peak GB", 1e-9, 2),
    "kv_bytes": ("KV MB", 1e-6, 1),
    "decode_gb_per_s": ("GB/s", 1.0, 1),
    "bandwidth_share": ("% of GB/s", 100.0, 0),
    "prefill_tflop_per_s": ("TFLOP/s", 1.0, 3),
    "flops_share": ("% of FLOP/s", 100.0, 0),
    "predicted_over_measured": ("predicted / measured", 1.0, 2),
    "prefill_predicted_over_measured": ("of prefill", 1.0, 2),
    "decode_predicted_over_measured": ("of decode", 1.0, 2),
    "repeats": ("pairs", 1.0, 0),
}
NOTES = (
    "Medians ± half the distance between the quartiles; x dense: dense time over the method's, end to end, of pairs of"
    " neighbouring runs.",
    "The dense row is dense timed against itself: what it is off 1 by is noise.",
    "% of GB/s, % of FLOP/s: of this machine's measured bandwidth and matrix product rate.",
    "Dense: same process, same kernels.",
    "peak GB: tensors allocated on a GPU; on a CPU the whole process, memory freed but kept for reuse included.",
    "predicted / measured: the roofline model's time for this machine over the measured one.",
)
PREDICTED = "Rows marked predicted come from the roofline model with public peak figures; nothing was run there."


def run_table(records: Sequence[Mapping[str, Any]]) -> RunTable:
    """One row per record, ordered by regime and output length, then as the methods were listed."""
    kinds = list(dict.fromkeys(_setting(record) for record in records))
    kinds.sort(key=lambda kind: (kind[0] != "resident", kind[0], kind[1]))
    rows = [_cells(record) for kind in kinds for record in records if _setting(record) == kind]
    header = ("method", "keep", "weights", "output tokens", *(title for title, _, _ in _COLUMNS.values()))
    models = dict.fromkeys(record["labels"]["model"] for record in records if record["labels"].get("model"))
    notes = (*((f"Model: {'; '.join(models)}.",) if models else ()), *_origins(records), *NOTES)
    notes += (PREDICTED,) if any(record["bench"]["predicted"] for record in records) else ()
    return RunTable(header, tuple(rows), notes)


def print_rows(table: RunTable) -> None:
    """Print to the terminal, or unfolded to a pipe."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 240
    table.show(console)


def _origins(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where measured rows come from, one note per machine."""
    known = [r["provenance"] for r in records if r.get("provenance") and not r["bench"]["predicted"]]
    machines = dict.fromkeys(
        f"{origin['hardware']['gpu'] or origin['hardware']['cpu']}, {origin['hardware'].get('threads')} CPU threads, "
        f"torch {origin['versions'].get('torch')}"
        for origin in known
    )
    return [f"Measured on: {machine}." for machine in machines]


def _setting(record: Mapping[str, Any]) -> tuple[str, int]:
    bench = record["bench"]
    where = bench["regime"]
    if bench["predicted"]:
        where = f"{bench['device']}, {where}, {prediction_note(bench.get('from_layers'))}"
    else:
        where += engines_note(bench["engine"], bench["dense_engine"])
    return where, bench["output_tokens"]


def _cells(record: Mapping[str, Any]) -> tuple[str, ...]:
    bench, labels = record["bench"], record["labels"]
    where, tokens = _setting(record)
    keep = "" if labels["keep"] is None else str(labels["keep"])
    return labels["method"], keep, where, str(tokens), *(_text(bench, name) for name in _COLUMNS)


def _text(bench: Mapping[str, Any], name: str) -> str:
    value = bench.get(name)
    _, factor, digits = _COLUMNS[name]
    if value is None:
        return HOLE
    spread = bench.get(f"{name}_iqr")
    around = "" if spread is None else f" ±{factor * spread / 2:.{digits}f}"
    return f"{factor * value:.{digits}f}{around}"
