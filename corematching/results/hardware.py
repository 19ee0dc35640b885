"""The hardware table: prefill, decode, end to end and memory per device, method and output length."""

from __future__ import annotations

import math

import pandas as pd

from corematching.results.load import keep_order
from corematching.results.table import engines_note, prediction_note
from corematching.results.tables import (
    BYTES_UNITS,
    Column,
    Entry,
    Row,
    Table,
    budget,
    hole,
    mark,
    number,
    significant,
    unit_scale,
    word,
)

#: Fields of an efficiency row (``bench`` in ``cell.json``). Times are medians in milliseconds; ``<field>_iqr``, where
#: present, is the distance between their quartiles. Memory is in bytes, shares are of the measured peak, in [0, 1].
TIMES = {
    "prefill_ms": "Prefill ms",
    "decode_ms_per_token": "Decode ms/token",
    "end_to_end_ms": "End to end ms",
    "overhead_ms": "Overhead ms",
}
BYTES = {"peak_memory_bytes": "Peak memory", "kv_bytes": "KV cache"}
RATES = {
    "flops_share": ("% of FLOP/s", 100.0),
    "decode_gb_per_s": ("GB/s", 1.0),
    "bandwidth_share": ("% of bandwidth", 100.0),
}
#: What must be equal for two rows to be compared.
SETTING = ["model", "device", "regime", "output_tokens", "predicted", "dense_engine", "dtype", "prompt_tokens"]


def efficiency_rows(cells: pd.DataFrame) -> pd.DataFrame:
    """Efficiency cells with their ``bench`` fields as columns, and speed-ups over the dense row of the same setting.

    Returns
    -------
    pandas.DataFrame
        Empty if there are none; ``speedup`` is dense end-to-end time over the row's own, taken pair by pair where the
        row says so (drift of the machine cancels), else from the dense row of the same setting. Of rows for one line
        of the table the one finished last counts; ``attrs["older"]`` is the number of others.
    """
    chosen = cells[(cells["kind"] == "efficiency") & cells["bench"].map(lambda row: isinstance(row, dict))]
    fields = [
        "device",
        "regime",
        "output_tokens",
        "predicted",
        "dense_engine",
        "engine",
        "from_layers",
        "prompt_tokens",
        "repeats",
        *TIMES,
        *BYTES,
        *RATES,
        "paired_speedup",
        "paired_speedup_iqr",
        *(f"{name}_iqr" for name in TIMES),
    ]
    names = ["id", "folder", "model", "method", "method_name", "keep", "dtype", "hardware", "finished", "flops_total"]
    names += ["model_config", "versions", "git_commit"]
    rows = chosen[names].reset_index(drop=True)
    for name in fields:
        rows[name] = pd.Series([bench.get(name) for bench in chosen["bench"]], index=rows.index, dtype=object)
    rows["device"] = rows["device"].where(rows["device"].notna(), rows["hardware"])
    rows["regime"] = rows["regime"].where(rows["regime"].notna(), "resident")
    rows["predicted"] = rows["predicted"].map(lambda value: value is True).astype(object)
    for name in ("dense_engine", "engine"):
        rows[name] = rows[name].where(rows[name].notna(), "")
    for name in fields[6:]:
        rows[name] = pd.to_numeric(rows[name], errors="coerce")
    rows["prompt_tokens"] = rows["prompt_tokens"].fillna(0).astype(int)
    rows["dtype"] = rows["dtype"].where(rows["dtype"].notna(), "")
    rows, older = _latest(rows)
    dense = (
        rows[rows["method_name"] == "dense"].drop_duplicates(SETTING, keep="last").set_index(SETTING)["end_to_end_ms"]
    )
    times = [dense.get(tuple(setting), math.nan) for setting in rows[SETTING].itertuples(index=False)]
    unpaired = pd.Series(times, index=rows.index, dtype=float) / rows["end_to_end_ms"]
    rows = rows.assign(speedup=rows["paired_speedup"].where(rows["paired_speedup"].notna(), unpaired))
    rows.attrs["older"] = older
    return rows


def _latest(rows: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The rows without those that a later one replaces, such as after a change in how rows are measured."""
    line = [*SETTING, "method", "keep"]
    order = rows["finished"].fillna("").astype(str).sort_values(kind="stable").index
    kept = rows.loc[order].astype(dict.fromkeys(line, str)).drop_duplicates(line, keep="last").index.sort_values()
    return rows.loc[kept].reset_index(drop=True), len(rows) - len(kept)


def setting_title(row: pd.Series) -> str:
    """One line for the setting of a row: model, device, type, regime, output length; predictions say so."""
    words = [row["model"], row["device"], *([row["dtype"]] if row["dtype"] else []), row["regime"]]
    if row["predicted"] is True:
        words.append(prediction_note(row["from_layers"]))
    return ", ".join(map(str, words)) + f", {row['output_tokens']} output tokens"


def hardware_table(rows: pd.DataFrame) -> Table | None:
    """All efficiency rows; ``None`` if there are none. Numbers compete within one setting."""
    if rows.empty:
        return None
    scales = {name: unit_scale(rows[name], BYTES_UNITS) for name in BYTES}
    body = []
    for row in sorted((rows.loc[index] for index in rows.index), key=_order):
        predicted = f" ({prediction_note(row['from_layers'])})" if row["predicted"] is True else ""
        entries = [
            word(row["model"]),
            word(row["device"]),
            word(f"{row['regime']}{predicted}{engines_note(row['engine'], row['dense_engine'])}"),
            word("?" if row["output_tokens"] is None else row["output_tokens"]),
            word(row["method"]),
            word(budget(row["keep"])),
            *(_time(row, name) for name in TIMES),
            *(significant(row[name] / scales[name][0]) for name in BYTES),
            *(number(factor * row[name]) for name, (_, factor) in RATES.items()),
            _with_spread(row["speedup"], row["paired_speedup_iqr"], 2, "no dense row with this device, regime and output length"),
            number(row["repeats"], 0),
        ]
        body.append(Row(tuple(entries), "/".join(str(row[name]) for name in SETTING)))
    columns = (
        *(Column(key, heading, numeric=False) for key, heading in (("model", "Model"), ("device", "Device"))),
        Column("regime", "Weights", numeric=False),
        Column("output", "Output tokens"),
        Column("method", "Method", numeric=False),
        Column("keep", "Keep"),
        *(Column(name, heading, "lower") for name, heading in TIMES.items() if name != "overhead_ms"),
        Column("overhead_ms", TIMES["overhead_ms"]),
        Column("peak_memory_bytes", f"{BYTES['peak_memory_bytes']} {scales['peak_memory_bytes'][1]}"),
        Column("kv_bytes", f"{BYTES['kv_bytes']} {scales['kv_bytes'][1]}", "lower"),
        *(Column(name, heading) for name, (heading, _) in RATES.items()),
        Column("speedup", "Speed-up", "higher"),
        Column("repeats", "Pairs"),
    )
    caption = (
        "Medians over repeats, ± half the distance between the quartiles, at a forced output length; dense runs in"
        " the same process. Speed-up is dense end-to-end time over the row's own (median over pairs); the dense row's is"
        " dense against itself, and what it is off 1 by is noise. Peak memory on a CPU is the whole process's, which"
        " ranks nothing. Rows marked predicted come from the roofline model, not from a measurement. Bold: best,"
        " underlined: second best of a setting."
    )
    older = rows.attrs.get("older", 0)
    notes = (f"{older} older rows for the same lines are left out.",) if older else ()
    return mark(Table("hardware", "Time and memory", caption, columns, tuple(body), notes))


def _order(row: pd.Series) -> tuple:
    setting = (*(str(row[name]) for name in SETTING[:3]), row["output_tokens"] or 0)
    return (*setting, row["method_name"] != "dense", keep_order(row["keep"]), row["method"])


def _time(row: pd.Series, name: str) -> Entry:
    return _with_spread(row[name], row[f"{name}_iqr"], 2 if row[name] < 100 else 1, "not measured")


def _with_spread(value: float, quartiles: float, decimals: int, missing: str) -> Entry:
    if not math.isfinite(value):
        return hole(missing)
    return number(value, decimals, spread=f" ± {quartiles / 2:.{decimals}f}" if math.isfinite(quartiles) else "")
