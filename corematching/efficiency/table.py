"""The table of an efficiency run, made from its stored records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from corematching.results.columns import EFFICIENCY, SPEEDUP, Quantity
from corematching.results.order import line_order
from corematching.results.table import HOLE, KEEP, METHOD, RunColumn, RunTable
from corematching.results.terminal import show
from corematching.results.timing import batch_note, dense_is_off, engines_note, noise_warning, prediction_note

NOTES = (
    "Medians ± half the distance between the quartiles; speed-up: dense time over the method's, end to end, of pairs of"
    " neighbouring runs.",
    "Prefill is the time to the first token. Batches: times are of all their prompts together, tokens/s counts all.",
    "The dense row is dense timed against itself: what it is off 1 by is noise.",
    "% of GB/s, % of FLOP/s: of this machine's measured bandwidth and matrix product rate.",
    "Dense: same process, same kernels.",
    "peak GB: tensors allocated on a GPU; on a CPU the whole process, memory freed but kept for reuse included.",
    "predicted / measured: the roofline model's time for this machine over the measured one.",
    "calibrated / measured: the same with what a few kernels of the model's shapes, measured here, take.",
)
PREDICTED = (
    "Rows marked predicted come from the roofline model with public peak figures; nothing was run there. Their ratios"
    " are dense's predicted figure over the row's own."
)


def run_table(records: Sequence[Mapping[str, Any]], told: Sequence[str] = ()) -> RunTable:
    """One row per record, ordered by regime, batch size and output length, then as every table is.

    Parameters
    ----------
    records
        Finished efficiency records.
    told
        Notes to begin with.
    """
    kinds = list(dict.fromkeys(_setting(record) for record in records))
    kinds.sort(key=lambda kind: (kind[0] != "resident", kind))
    ordered = sorted(records, key=lambda one: line_order(one["config"]["method"]["name"], one["labels"]["keep"]))
    shown = [what for what in EFFICIENCY if any(record["bench"].get(what.key) is not None for record in records)]
    rows = [_cells(record, shown) for kind in kinds for record in ordered if _setting(record) == kind]
    columns = (
        METHOD,
        KEEP,
        RunColumn("weights", role="label", left=True),
        RunColumn("output tokens", "tokens", role="label"),
        *(RunColumn(what.name, what.short) for what in shown),
    )
    models = dict.fromkeys(record["labels"]["model"] for record in records if record["labels"].get("model"))
    notes = (*told, *((f"Model: {'; '.join(models)}.",) if models else ()), *_origins(records))
    notes += NOTES if any(not record["bench"]["predicted"] for record in records) else ()
    notes += (PREDICTED,) if any(record["bench"]["predicted"] for record in records) else ()
    return RunTable(columns, tuple(rows), notes, tuple(_warnings(records)))


def print_rows(table: RunTable) -> None:
    """Print to the terminal, or unfolded to a pipe."""
    from rich.console import Console

    show(table, Console(highlight=False))


def _warnings(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per setting in which dense timed against itself is off by more than its noise allows."""
    return [
        noise_warning(
            f"{where}{batch_note(batch)}, {tokens} output tokens", bench[SPEEDUP.key], bench.get(f"{SPEEDUP.key}_iqr")
        )
        for record in records
        if record["config"]["method"]["name"] == "dense"
        for bench, (where, batch, tokens) in [(record["bench"], _setting(record))]
        if dense_is_off(bench.get(SPEEDUP.key), bench.get(f"{SPEEDUP.key}_iqr"))
    ]


def _origins(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where measured rows come from, one note per machine."""
    known = [r["provenance"] for r in records if r.get("provenance") and not r["bench"]["predicted"]]
    machines = dict.fromkeys(
        f"{origin['hardware']['gpu'] or origin['hardware']['cpu']}, {origin['hardware'].get('threads')} CPU threads, "
        f"torch {origin['versions'].get('torch')}"
        for origin in known
    )
    return [f"Measured on: {machine}." for machine in machines]


def _setting(record: Mapping[str, Any]) -> tuple[str, int, int]:
    bench = record["bench"]
    where = bench["regime"]
    if bench["predicted"]:
        words = record["labels"].get("model"), bench.get("device"), bench.get("dtype"), where
        where = ", ".join((*filter(None, words), prediction_note(bench.get("from_layers"))))
    else:
        where += engines_note(bench.get("engine"), bench.get("dense_engine"))
    return where, int(bench.get("batch") or 1), bench["output_tokens"]


def _cells(record: Mapping[str, Any], shown: Sequence[Quantity]) -> tuple[str, ...]:
    bench, labels = record["bench"], record["labels"]
    where, batch, tokens = _setting(record)
    keep = HOLE if labels["keep"] is None else str(labels["keep"])
    return labels["method"], keep, where + batch_note(batch), str(tokens), *(_text(bench, what) for what in shown)


def _text(bench: Mapping[str, Any], what: Quantity) -> str:
    text, spread = what.text(bench.get(what.key)), bench.get(f"{what.key}_iqr")
    if text is None:
        return HOLE
    return text if spread is None else f"{text} ±{what.text(spread / 2)}"
