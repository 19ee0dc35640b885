"""The table of one run: on the terminal, and as ``table.md`` and ``table.csv`` beside the cells.

The paper's tables, with statistics, are made by `corematching.results.aggregate` from any number of runs; both take their
columns from `corematching.results.columns` and the order of lines from `corematching.results.order`.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from corematching import files
from corematching.results.columns import ANSWER, CAPPED, COSTS, FLOPS, SHARE, TOKENS, capped_text, runaway_note
from corematching.results.completeness import partial_record
from corematching.results.order import line_order
from corematching.results.tables import PARTIAL
from corematching.texts import neutral

HOLE = "—"
Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RunColumn:
    """A column: its title, a shorter one, and what becomes of it where there is little room.

    Attributes
    ----------
    role
        "label" (repeated in every block), "number" (moves to another block) or "cost" (left out first).
    left
        Whether its texts begin at the left.
    """

    title: str
    short: str = ""
    role: str = "number"
    left: bool = False


METHOD = RunColumn("method", role="label", left=True)
KEEP = RunColumn("keep", role="label")


@dataclass(frozen=True)
class RunTable:
    """Formatted cells of one run.

    Attributes
    ----------
    columns
        What stands in which column.
    rows
        One tuple of formatted texts per method and budget.
    notes
        Lines to print below: what the numbers are, and why there are holes.
    warnings
        Lines that must not be overlooked.
    """

    columns: tuple[RunColumn, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        harmless = {
            "rows": tuple(tuple(map(neutral, row)) for row in self.rows),
            "notes": tuple(map(neutral, self.notes)),
            "warnings": tuple(map(neutral, self.warnings)),
        }
        for name, texts in harmless.items():
            object.__setattr__(self, name, texts)

    @property
    def header(self) -> tuple[str, ...]:
        """Column titles."""
        return tuple(column.title for column in self.columns)

    def markdown(self) -> str:
        """A GitHub table with the notes below."""
        lines = [_pipe(self.header), _pipe("---" if column.left else "---:" for column in self.columns)]
        lines += [_pipe(row) for row in self.rows]
        told = [*(f"**Warning:** {warning}" for warning in self.warnings), *self.notes]
        return "\n".join([*lines, "", *(f"- {line}" for line in told)]) + "\n"

    def csv(self) -> str:
        """The same texts, comma-separated; holes are empty."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows(tuple("" if text == HOLE else text for text in row) for row in self.rows)
        return buffer.getvalue()

    def write(self, folder: Path, name: str = "table") -> None:
        """Write ``<name>.md`` and ``<name>.csv``."""
        files.write(folder / f"{name}.md", self.markdown())
        files.write(folder / f"{name}.csv", self.csv())


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
        Accuracy records of the run in its order; None for a cell that is missing. Those that share method, budget and
        benchmark (seeds) share a field: their mean, with the standard deviation over them.
    benchmarks
        Names of the benchmark columns, in order.
    notes
        What to say below the table besides the reasons for holes.
    ranked
        Add a note per budget that ranks the methods with as many visual tokens per layer as the random control.
    """
    present = [record for record in records if record is not None]
    rows: dict[tuple[str, Any], dict[str, list[Mapping[str, Any]]]] = {}
    for record in sorted(present, key=lambda one: line_order(one["config"]["method"]["name"], one["labels"]["keep"])):
        label = record["labels"]
        rows.setdefault((label["method"], label["keep"]), {}).setdefault(label["benchmark"], []).append(record)
    dense = {
        record["labels"]["benchmark"]: _value(record)
        for record in present
        if record["config"]["method"]["name"] == "dense" and not partial_record(record)
    }
    columns = (
        METHOD,
        KEEP,
        *(RunColumn(name) for name in benchmarks),
        RunColumn(SHARE.name, SHARE.short),
        *(RunColumn(quantity.name, quantity.short, "cost") for quantity in COSTS),
        *(RunColumn(quantity.name, quantity.short) for quantity in (ANSWER, CAPPED)),
    )
    lines = tuple(_line(label, cells, benchmarks, dense) for label, cells in rows.items())
    rankings = _rankings(rows, benchmarks, dense) if ranked else []
    scored = [name for name in benchmarks if dense.get(name)]
    partly = [f"% of dense averages {', '.join(scored)}"] if 0 < len(scored) < len(benchmarks) else []
    runaway = runaway_note([_capped_cell(*at, cells) for at, own in rows.items() for cells in own.values()])
    told = (*notes, *_seeds(rows), *partly, *_partial(present), *_remarks(records), *rankings, *_holes(records))
    return RunTable(columns, lines, told, (runaway,) if runaway else ())


def _partial(records: Records) -> list[str]:
    """Which scores come from a part of their subtasks."""
    found = {
        (record["labels"]["benchmark"], partial_record(record)) for record in records if _value(record) is not None
    }
    return [
        f"{PARTIAL} {name}: computed from {what}, left out of % of dense" for name, what in sorted(found) if what != ""
    ]


def _seeds(rows: Mapping[tuple[str, Any], Mapping[str, Records]]) -> list[str]:
    """How many seeds stand behind which lines."""
    counts = {method: max(map(len, cells.values())) for (method, _), cells in rows.items()}
    several = [f"{method} ({count})" for method, count in counts.items() if count > 1]
    return [f"mean ± standard deviation over seeds: {', '.join(several)}"] if several else []


def _capped_cell(method: str, keep: Any, cells: Records) -> tuple[str, float, float, float]:
    capped, answers = _capped(cells) or (0, 1)
    budget = "" if keep is None else f" {keep}"
    cap = max((cell["trace"].get("cap") or 0 for cell in cells if cell.get("trace")), default=0)
    return f"{cells[0]['labels']['benchmark']}, {method}{budget}:", capped, answers, cap


def _capped(cells: Records) -> tuple[int, int] | None:
    """Answers that hit the cap, and all answers; None if nobody counted."""
    traces = [cell["trace"] for cell in cells if cell.get("trace")]
    if not traces or any(trace.get("capped_answers") is None for trace in traces):
        return None
    capped = sum(trace["capped_answers"] for trace in traces)
    return capped, capped + sum(trace["ended_answers"] for trace in traces)


def _remarks(records: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """What a reader of a benchmark's scores must know, e.g. who graded them, where all its cells say the same."""
    said: dict[str, set[str]] = {}
    for record in records:
        if record is not None and _value(record) is not None:
            said.setdefault(record["labels"]["benchmark"], set()).add(record["score"].get("note", ""))
    return [f"{name}: {''.join(notes)}" for name, notes in said.items() if len(notes) == 1 and notes != {""}]


def _line(
    label: tuple[str, Any],
    cells: Mapping[str, Records],
    benchmarks: Sequence[str],
    dense: Mapping[str, float | None],
) -> tuple[str, ...]:
    method, keep = label
    everything = [cell for own in cells.values() for cell in own]
    share = _share(cells, benchmarks, dense)
    capped = _capped(everything)
    return (
        method,
        HOLE if keep is None else str(keep),
        *(_score(cells.get(name, ())) for name in benchmarks),
        SHARE.text(share) or HOLE,
        *(quantity.text(_traced(everything, quantity.key)) or HOLE for quantity in (*COSTS, ANSWER)),
        (capped_text(*capped) if capped else None) or HOLE,
    )


def _score(cells: Records) -> str:
    """A field: the score, or the mean over seeds and its spread; a hole if one of them has none."""
    values = [value for cell in cells if (value := _value(cell)) is not None]
    if not values or len(values) < len(cells):
        return HOLE
    mark = PARTIAL if any(map(partial_record, cells)) else ""
    return f"{fmean(values):.1f}" + (f" ±{stdev(values):.1f}" if len(values) > 1 else "") + mark


def _share(cells: Mapping[str, Records], benchmarks: Sequence[str], dense: Mapping[str, float | None]) -> float | None:
    """Mean percentage of the dense scores, over the benchmarks that dense has one on; None if one is missing here."""
    bases = {name: base for name in benchmarks if (base := dense.get(name))}
    shares = []
    for name, base in bases.items():
        values = [_value(cell) for cell in cells.get(name, ())]
        if not values or None in values:
            return None
        shares.append(100 * fmean(value for value in values if value is not None) / base)
    return fmean(shares) if shares else None


def _traced(cells: Records, key: str) -> float | None:
    """Mean of a trace summary's entry over cells; None if one of them lacks it."""
    traces = [cell["trace"] for cell in cells if cell.get("trace")]
    values = [trace["flops"].get("total") if key == FLOPS.key else trace.get(key) for trace in traces]
    return None if not values or None in values else fmean(values)


def _rankings(
    rows: Mapping[tuple[str, Any], Mapping[str, Records]],
    benchmarks: Sequence[str],
    dense: Mapping[str, float | None],
) -> list[str]:
    """One line per budget: methods by share of dense, among those within 3 % of the random control's tokens."""
    standing: dict[Any, list[tuple[float, float, str, bool]]] = {}
    for (method, keep), cells in rows.items():
        share = _share(cells, benchmarks, dense)
        everything = [cell for own in cells.values() for cell in own]
        tokens = _traced(everything, TOKENS.key)
        if share is not None and tokens is not None:
            control = all(cell["config"]["method"]["name"] == "random" for cell in everything)
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
    return "| " + " | ".join(map(_escaped, texts)) + " |"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is; underscores inside of words mean nothing to it."""
    return re.sub(r"[\\`*\[\]|<>]", lambda found: f"\\{found[0]}", text)
