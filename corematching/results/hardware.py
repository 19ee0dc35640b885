"""The hardware table: prefill, decode, end to end and memory per device, method and output length."""

from __future__ import annotations

import math

import pandas as pd

from corematching.results.columns import EFFICIENCY, SPEEDUP, Quantity
from corematching.results.order import line_order
from corematching.results.tables import BUNDLED_TIMES, Column, Entry, Row, Table, budget, mark, quantity, word
from corematching.results.timing import batch_note, dense_is_off, engines_note, noise_warning, prediction_note

#: What must be equal for two rows to be compared.
SETTING = ["model", "device", "regime", "output_tokens", "predicted", "dense_engine", "dtype", "prompt_tokens", "batch"]


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
        "batch",
        "repeats",
        "streamed_bytes_per_token",
        *(what.key for what in EFFICIENCY if what.key != "repeats"),
        *(f"{what.key}_iqr" for what in EFFICIENCY if what.key != "repeats"),
    ]
    names = ["id", "folder", "model", "method", "method_name", "keep", "dtype", "hardware", "finished", "flops_total"]
    names += ["model_config", "versions", "git_commit", "place"]
    rows = chosen[names].reset_index(drop=True)
    bundled = [str(config.get("path", "")).startswith("packaged:") for config in chosen["model_config"]]
    rows["bundled"] = pd.Series(bundled, index=rows.index, dtype=bool)
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
    rows["batch"] = rows["batch"].fillna(1).astype(int)
    planned = pd.Series([bench.get("dtype") for bench in chosen["bench"]], index=rows.index, dtype=object)
    rows["dtype"] = planned.where(planned.notna(), rows["dtype"])  # a card is planned with its own type
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
    return ", ".join(map(str, words)) + f"{batch_note(row['batch'])}, {row['output_tokens']} output tokens"


def hardware_table(rows: pd.DataFrame) -> Table | None:
    """All efficiency rows; ``None`` if there are none. Numbers compete within one setting."""
    if rows.empty:
        return None
    shown = [what for what in EFFICIENCY if rows[what.key].notna().any() or what in (*EFFICIENCY[:3], SPEEDUP)]
    noisy = unsteady_settings(rows)
    body = []
    for row in sorted((rows.loc[index] for index in rows.index), key=_order):
        predicted = f", {row['dtype']} ({prediction_note(row['from_layers'])})" if row["predicted"] is True else ""
        entries = [
            word(row["model"]),
            word(row["device"]),
            word(f"{row['regime']}{batch_note(row['batch'])}{predicted}{engines_note(row['engine'], row['dense_engine'])}"),
            word("?" if row["output_tokens"] is None else row["output_tokens"]),
            word(row["method"]),
            word(budget(row["keep"])),
            *(_entry(row, what) for what in shown),
        ]
        # Where dense cannot be told from dense, nothing is best: numbers of block None do not compete.
        body.append(Row(tuple(entries), None if _setting(row) in noisy else "/".join(_setting(row))))
    columns = (
        *(Column(key, heading, numeric=False) for key, heading in (("model", "Model"), ("device", "Device"))),
        Column("regime", "Weights", numeric=False),
        Column("output", "Output tokens"),
        Column("method", "Method", numeric=False),
        Column("keep", "Keep"),
        *(Column(what.key, what.title, what.better) for what in shown),
    )
    caption = (
        "Medians over repeats, ± half the distance between the quartiles, at a forced output length; dense runs in"
        " the same process. Speed-up is dense end-to-end time over the row's own (median over pairs); the dense row's is"
        " dense against itself, and what it is off 1 by is noise. Peak memory on a CPU is the whole process's, which"
        " ranks nothing. Rows marked predicted come from the roofline model, not from a measurement. Bold: best,"
        " underlined: second best of a setting."
    )
    notes = [warning for _, warning in noisy.values()]
    older = rows.attrs.get("older", 0)
    notes += [f"{older} older rows for the same lines are left out."] if older else []
    banner = BUNDLED_TIMES if rows["bundled"].any() else ""
    return mark(Table("hardware", "Time and memory", caption, columns, tuple(body), tuple(notes), banner))


def unsteady_settings(rows: pd.DataFrame) -> dict[tuple[str, ...], tuple[float, str]]:
    """Settings in which dense timed against itself is off by more than its noise allows: by what, and in words."""
    dense = rows[(rows["method_name"] == "dense") & (rows["predicted"] != True)]  # noqa: E712  # a column of objects
    found = {}
    for index in dense.index:
        row = dense.loc[index]
        if dense_is_off(row[SPEEDUP.key], row[f"{SPEEDUP.key}_iqr"]):
            off = (row[SPEEDUP.key], row[f"{SPEEDUP.key}_iqr"])
            found[_setting(row)] = (row[SPEEDUP.key], noise_warning(setting_title(row), *off))
    return found


def _order(row: pd.Series) -> tuple:
    setting = (*(str(row[name]) for name in SETTING[:3]), row["batch"], row["output_tokens"] or 0)
    return (*setting, *line_order(row["method_name"], row["keep"]), row["place"], row["method"])


def _setting(row: pd.Series) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in SETTING)


def _entry(row: pd.Series, what: Quantity) -> Entry:
    """A measured quantity with half the distance between its quartiles, where the row has that."""
    if what is SPEEDUP and not math.isfinite(row[what.key]):
        # Rows of other benches hold no pairs; their speed-up is over the dense row of the same setting.
        return quantity(what, row["speedup"], "no dense row with this device, regime and output length")
    around = what.text(row.get(f"{what.key}_iqr", math.nan) / 2)
    return quantity(what, row[what.key], spread=f" ± {around}" if around else "")
