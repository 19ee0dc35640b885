"""The table of a long-decode run: what decode steps read, cover, say and take, by method, budget and context."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from corematching.results.columns import TIMES, Quantity
from corematching.results.order import line_order
from corematching.results.statistics import mean_interval
from corematching.results.table import HOLE, KEEP, METHOD, RunColumn, RunTable

BENCHMARK = "long_decode"
METRIC = "tokens as dense says them"
CONTEXT = Quantity("context", "context", "context", digits=0)
READ = Quantity("rows_read", "rows read/step", "rows", digits=0)
MASS = Quantity("mass_read", "% of dense attention covered", "% mass", 100.0, 1)
TIME = TIMES[1]
SPEEDUP = Quantity("decode_speedup", "x dense", "x dense", digits=2)
NUMBERS = (CONTEXT, READ, MASS)
COLUMNS = (
    RunColumn("pictures", "pics", role="label"),
    METHOD,
    KEEP,
    *(RunColumn(quantity.name, quantity.short) for quantity in NUMBERS),
    RunColumn("says what dense says % [95 %]", "= dense %"),
    RunColumn(TIME.name, TIME.short),
    RunColumn(SPEEDUP.name, SPEEDUP.short),
)
NOTES = (
    "Decode steps are fed the dense model's greedy answer, of fixed length wherever it would have ended. Says what"
    " dense says: share of steps after which the likeliest token is dense's; its interval is Student's over prompts.",
    "Rows read/step: KV rows per layer and step, its own among them (mean over KV heads, layers and steps). % of"
    " dense attention covered: their share of the attention over all rows, under the method's own queries (mean over"
    " heads, layers and steps), rows that a method evicted among them.",
    "Decode ms/token: median over prompts, of the method as it is; x dense: median of dense / own, taken in turns.",
)


def long_decode_table(cells: Sequence[tuple[Mapping[str, Any], pd.DataFrame]], told: Iterable[str] = ()) -> RunTable:
    """One row per number of pictures, method and budget."""
    ordered = sorted(cells, key=lambda cell: (_images(cell[0]), *_order(cell[0])))
    return RunTable(COLUMNS, tuple(_texts(*cell) for cell in ordered), (*told, *_origins(cells), *NOTES))


def _images(record: Mapping[str, Any]) -> int:
    return int(record["config"]["benchmark"]["name"].rpartition("_")[2])


def _order(record: Mapping[str, Any]) -> tuple:
    labels = record["labels"]
    return line_order(record["config"]["method"]["name"], labels["keep"])


def _texts(record: Mapping[str, Any], samples: pd.DataFrame) -> tuple[str, ...]:
    labels, metrics = record["labels"], record["metrics"]
    by_prompt = 100 * samples.groupby("unit", sort=False)["score"].mean().to_numpy()
    agreement = f"{by_prompt.mean():.1f}"
    if len(by_prompt) > 1 and by_prompt.std():
        _, low, high = mean_interval(by_prompt)
        agreement += f" [{max(0, low):.1f}, {min(100, high):.1f}]"
    return (
        str(_images(record)),
        labels["method"],
        HOLE if labels["keep"] is None else str(labels["keep"]),
        *(quantity.text(metrics[quantity.key]) or HOLE for quantity in NUMBERS),
        agreement,
        TIME.text(metrics[TIME.key]) or HOLE,
        SPEEDUP.text(metrics[SPEEDUP.key]) or HOLE,
    )


def _origins(cells: Sequence[tuple[Mapping[str, Any], pd.DataFrame]]) -> list[str]:
    """What was measured, on what."""
    told = dict.fromkeys(
        f"{record['labels']['model']} ({record['config']['model']['dtype']}), "
        f"{record['config']['benchmark']['limit']} prompts of each length; "
        f"{record['provenance']['hardware']['gpu'] or record['provenance']['hardware']['cpu']}, "
        f"torch {record['provenance']['versions'].get('torch')}, commit {record['provenance'].get('git_commit')}."
        for record, _ in cells
    )
    return list(told)
