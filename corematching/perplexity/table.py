"""The table of a text run: perplexity by method and budget, beside dense and beside random neurons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from corematching.results.columns import FLOPS, NEURONS
from corematching.results.order import line_order
from corematching.results.statistics import mean_interval
from corematching.results.table import HOLE, KEEP, METHOD, RunColumn, RunTable

BENCHMARK = "next_token"
METRIC = "next-token accuracy"
CONTROL = "random_neurons"
COLUMNS = (
    METHOD,
    KEEP,
    RunColumn("perplexity", "ppl"),
    RunColumn("x dense [95 %]", "x dense"),
    RunColumn("x random neurons [95 %]", "x random"),
    RunColumn("next token right %", "right %"),
    RunColumn("says what dense says %", "= dense %"),
    RunColumn(NEURONS.name, NEURONS.short),
    RunColumn(FLOPS.name, FLOPS.short, role="cost"),
)
NOTES = (
    "Perplexity: exp of the mean negative log likelihood of the decoded tokens, of all seeds together.",
    "x dense, x random neurons (of the same keep): ratio of perplexities; its interval is Student's for the mean"
    " difference of log likelihoods between windows.",
    "Prefill is dense: only the decoded tokens' FFNs are reduced. GFLOPs: of a window, context included.",
)


@dataclass(frozen=True)
class Line:
    """The cells of one line: a method's seeds at one budget."""

    name: str
    label: str
    keep: Any
    records: list[Mapping[str, Any]]
    samples: list[pd.DataFrame]

    @property
    def by_window(self) -> np.ndarray:
        """Mean negative log likelihood of every window, [windows], over tokens and seeds."""
        return np.mean([own.groupby("unit", sort=False)["nll"].mean() for own in self.samples], axis=0)

    def mean(self, column: str) -> float:
        return float(np.mean([own[column].mean() for own in self.samples]))

    def agreement(self, dense: Line) -> float:
        """Share (%) of tokens at which the likeliest is dense's."""
        said = dense.samples[0]["prediction"].to_numpy()
        return 100 * float(np.mean([(own["prediction"].to_numpy() == said).mean() for own in self.samples]))

    def traced(self, name: str) -> Any:
        return self.records[0]["trace"][name]


def perplexity_table(cells: Sequence[tuple[Mapping[str, Any], pd.DataFrame]], told: Iterable[str] = ()) -> RunTable:
    """One row per method and budget.

    Parameters
    ----------
    cells
        Finished records of a text run, each with its rows.
    told
        Notes to begin with.
    """
    lines = _lines(cells)
    dense = next((line for line in lines if line.name == "dense"), None)
    controls = {line.keep: line for line in lines if line.name == CONTROL}
    rows = [_texts(line, dense, controls.get(line.keep)) for line in lines]
    return RunTable(COLUMNS, tuple(rows), (*told, *_origins(cells), *NOTES))


def _lines(cells: Sequence[tuple[Mapping[str, Any], pd.DataFrame]]) -> list[Line]:
    lines: dict[tuple, Line] = {}
    for record, samples in cells:
        name, labels = record["config"]["method"]["name"], record["labels"]
        line = lines.setdefault(
            (labels["method"], labels["keep"]), Line(name, labels["method"], labels["keep"], [], [])
        )
        line.records.append(record)
        line.samples.append(samples)
    return sorted(lines.values(), key=lambda line: line_order(line.name, line.keep))


def _texts(line: Line, dense: Line | None, control: Line | None) -> tuple[str, ...]:
    layers = [count for count in line.traced("neurons_by_layer") if count is not None]
    return (
        line.label,
        HOLE if line.keep is None else str(line.keep),
        _short(float(np.exp(line.mean("nll")))),
        _ratio(line, dense),
        _ratio(line, control),
        f"{100 * line.mean('score'):.1f}",
        HOLE if dense is None else f"{line.agreement(dense):.1f}",
        NEURONS.text(float(np.mean(layers))) or HOLE if layers else "all",
        FLOPS.text(line.traced("flops")["total"]) or HOLE,
    )


def _ratio(line: Line, other: Line | None) -> str:
    if other is None or other is line:
        return HOLE
    middle, low, high = map(_short, np.exp(mean_interval(line.by_window - other.by_window)))
    return f"{middle} [{low}, {high}]"


def _short(value: float) -> str:
    """Three decimals below 10, fewer above: ratios here span six powers of ten."""
    return f"{value:.{3 if value < 10 else 1 if value < 1000 else 0}f}"


def _origins(cells: Sequence[tuple[Mapping[str, Any], pd.DataFrame]]) -> list[str]:
    """What was measured, on what."""
    told = dict.fromkeys(
        f"{record['labels']['model']} ({record['config']['model']['dtype']}) on {record['labels']['data']}: "
        f"{record['config']['benchmark']['limit']} windows, {record['config']['prompt']}; "
        f"{record['provenance']['hardware']['gpu'] or record['provenance']['hardware']['cpu']}, "
        f"torch {record['provenance']['versions'].get('torch')}, commit {record['provenance'].get('git_commit')}."
        for record, _ in cells
    )
    return list(told)
