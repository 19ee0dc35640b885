"""The table of one run: on the terminal, and as ``table.md`` and ``table.csv`` beside the cells.

The paper's tables, with statistics, are made by `corematching.results.aggregate` from any number of runs.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from corematching import files

HOLE = "—"


@dataclass(frozen=True)
class RunTable:
    """Formatted cells of one run.

    Attributes
    ----------
    header
        Column titles.
    rows
        One tuple of formatted texts per method and budget.
    notes
        Lines to print below: what the numbers are, and why there are holes.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]

    def markdown(self) -> str:
        """A GitHub table with the notes below."""
        lines = [_pipe(self.header), _pipe("---" if i == 0 else "---:" for i in range(len(self.header)))]
        lines += [_pipe(row) for row in self.rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)]) + "\n"

    def csv(self) -> str:
        """The same texts, comma-separated; holes are empty."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows(tuple("" if text == HOLE else text for text in row) for row in self.rows)
        return buffer.getvalue()

    def write(self, folder: Path) -> None:
        """Write ``table.md`` and ``table.csv``."""
        files.write(folder / "table.md", self.markdown())
        files.write(folder / "table.csv", self.csv())

    def show(self, console: Any) -> None:
        """Print to a rich console."""
        from rich.table import Table

        table = Table(show_edge=False, pad_edge=False)
        for i, title in enumerate(self.header):
            table.add_column(title, justify="left" if i == 0 else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for note in self.notes:
            console.print(f"  {note}", style="dim", markup=False, highlight=False, soft_wrap=True)


def build_table(
    records: Sequence[Mapping[str, Any] | None],
    benchmarks: Sequence[str],
    notes: Sequence[str],
    ranked: bool = False,
) -> RunTable:
    """Lay out a run's records.

    Parameters
    ----------
    records
        Accuracy records of the run in its order; None for a cell that is missing.
    benchmarks
        Names of the benchmark columns, in order.
    notes
        What to say below the table besides the reasons for holes.
    ranked
        Add a note per budget that ranks the methods with as many visual tokens per layer as the random control.
    """
    rows: dict[tuple[str, Any], dict[str, Mapping[str, Any]]] = {}
    for record in records:
        if record is not None:
            label = record["labels"]
            rows.setdefault((label["method"], label["keep"]), {})[label["benchmark"]] = record
    dense = {
        record["labels"]["benchmark"]: _value(record)
        for record in records
        if record is not None and record["config"]["method"]["name"] == "dense"
    }
    header = ("method", "keep", *benchmarks, "% of dense", "tokens/layer", "KV MB", "prefill TFLOPs")
    lines = tuple(_line(label, cells, benchmarks, dense) for label, cells in rows.items())
    rankings = _rankings(rows, benchmarks, dense) if ranked else []
    scored = [name for name in benchmarks if dense.get(name)]
    partly = [f"% of dense averages {', '.join(scored)}"] if 0 < len(scored) < len(benchmarks) else []
    return RunTable(header, lines, (*notes, *partly, *_remarks(records), *rankings, *_holes(records)))


def _remarks(records: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """What a reader of a benchmark's scores must know, e.g. who graded them, where all its cells say the same."""
    said: dict[str, set[str]] = {}
    for record in records:
        if record is not None and _value(record) is not None:
            said.setdefault(record["labels"]["benchmark"], set()).add(record["score"].get("note", ""))
    return [f"{name}: {''.join(notes)}" for name, notes in said.items() if len(notes) == 1 and notes != {""}]


def _line(
    label: tuple[str, Any],
    cells: Mapping[str, Mapping[str, Any]],
    benchmarks: Sequence[str],
    dense: Mapping[str, float | None],
) -> tuple[str, ...]:
    method, keep = label
    values = {name: _value(cells[name]) for name in benchmarks if name in cells}
    traces = [cell["trace"] for cell in cells.values() if cell.get("trace")]
    return (
        method,
        HOLE if keep is None else str(keep),
        *(_number(values.get(name), 1) for name in benchmarks),
        _number(_share(cells, benchmarks, dense), 1),
        _number(_trace_mean(traces, "visual_tokens_per_layer"), 1),
        _number(_trace_mean(traces, "kv_bytes", 1e6), 2),
        _number(_trace_mean([trace["flops"] for trace in traces], "prefill", 1e12), 4),
    )


def _share(
    cells: Mapping[str, Mapping[str, Any]], benchmarks: Sequence[str], dense: Mapping[str, float | None]
) -> float | None:
    """Mean percentage of the dense scores, over the benchmarks that dense has one on; None if one is missing here."""
    bases = {name: base for name in benchmarks if (base := dense.get(name))}
    values = {name: _value(cells[name]) for name in bases if name in cells}
    shares = [100 * value / bases[name] for name, value in values.items() if value is not None]
    return fmean(shares) if shares and len(shares) == len(bases) else None


def _rankings(
    rows: Mapping[tuple[str, Any], Mapping[str, Mapping[str, Any]]],
    benchmarks: Sequence[str],
    dense: Mapping[str, float | None],
) -> list[str]:
    """One line per budget: methods by share of dense, among those within 3 % of the random control's tokens."""
    standing: dict[Any, list[tuple[float, float, str, bool]]] = {}
    for (method, keep), cells in rows.items():
        share = _share(cells, benchmarks, dense)
        tokens = _trace_mean([cell["trace"] for cell in cells.values() if cell.get("trace")], "visual_tokens_per_layer")
        if share is not None and tokens is not None:
            control = all(cell["config"]["method"]["name"] == "random" for cell in cells.values())
            standing.setdefault(keep, []).append((share, tokens, method, control))
    lines = []
    for entries in standing.values():
        budget = next((tokens for _, tokens, _, control in entries if control), None)
        if budget is None:
            continue
        peers = [entry for entry in entries if abs(entry[1] - budget) <= 0.03 * budget]
        ranks = {entry: 1 + sum(other[0] > entry[0] for other in peers) for entry in peers}
        named = [
            f"{rank}. {method}{' (control)' if control else ''} {share:.1f}"
            for (share, _, method, control), rank in sorted(ranks.items(), key=lambda item: item[1])
        ]
        lines.append(f"ranking at {budget:.0f} visual tokens per layer (% of dense): {', '.join(named)}")
    return lines


def _value(record: Mapping[str, Any]) -> float | None:
    return (record.get("score") or {}).get("value") if record["status"] == "done" else None


def _trace_mean(traces: Sequence[Mapping[str, Any]], key: str, unit: float = 1.0) -> float | None:
    return fmean(trace[key] for trace in traces) / unit if traces else None


def _number(value: float | None, digits: int) -> str:
    return HOLE if value is None else f"{value:.{digits}f}"


def _holes(records: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """One line per cell without a score: which, and why."""
    lines = []
    for record in records:
        if record is None or record["status"] == "done":
            continue
        label = record["labels"]
        error = record.get("error") or {}
        why = f"{error.get('type')}: {error.get('message')}" if error else (record.get("score") or {}).get("note", "")
        budget = "" if label["keep"] is None else f" keep={label['keep']}"
        what = record["status"].replace("_", " ")
        lines.append(
            f"{HOLE} {label['benchmark']}, {label['method']}{budget}: {what} ({' '.join(str(why).split())[:200]})"
        )
    missing = sum(record is None for record in records)
    if missing:
        lines.append(f"{HOLE} {missing} cells have not run yet")
    return lines


def _pipe(texts: Any) -> str:
    return "| " + " | ".join(str(text).replace("|", "\\|") for text in texts) + " |"


def prediction_note(from_layers: float | None) -> str:
    """How a row that was not measured is marked; from a slice of so many layers, if any."""
    return "predicted" + (f" from {from_layers:.0f} layers" if from_layers and from_layers > 0 else "")


def engines_note(engine: str, dense_engine: str) -> str:
    """How a row is marked whose dense runs decoded with another engine; empty if they did not."""
    different = engine and dense_engine and engine != dense_engine
    return f", {engine} against {dense_engine} dense" if different else ""
