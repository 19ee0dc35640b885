"""Questions on which the methods disagree, for the report: their answers side by side, with score and mark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from corematching.results.accuracy import methods_of
from corematching.results.aggregate import Aggregation
from corematching.results.tables import budget
from corematching.results.titles import benchmark_order, title

SHOWN = 20
"""Questions per benchmark."""
LONGEST = 240
"""Letters of an answer or a prompt that are shown; the whole text is a tooltip."""
COLUMNS = ["doc_id", "prompt", "prediction", "target", "score"]


@dataclass(frozen=True)
class Given:
    """One method's answer: what is shown of it, the whole of it, its score, and a mark for right, partly, wrong."""

    text: str
    whole: str
    score: str
    mark: str

    @property
    def kind(self) -> str:
        return {"✓": "right", "◐": "partly", "✗": "wrong"}[self.mark]


@dataclass(frozen=True)
class Asked:
    """One question and the answers of all methods, in the order of :attr:`Block.labels`."""

    doc_id: int
    prompt: str
    target: str
    answers: tuple[Given, ...]


@dataclass(frozen=True)
class Block:
    """The first questions of one benchmark on which the methods' scores differ."""

    benchmark: str
    title: str
    labels: tuple[str, ...]
    questions: tuple[Asked, ...]


def disagreements(aggregation: Aggregation, group: pd.DataFrame) -> list[Block]:
    """Blocks of one context's cells, each method at its smallest budget; benchmarks without a difference are left out."""
    rows = methods_of(group).groupby("method", sort=False).tail(1)
    blocks = []
    for benchmark in benchmark_order(group["benchmark"]):
        at = group[(group["benchmark"] == benchmark) & (group["status"] == "done")].set_index("row")
        chosen = [row for row in rows.itertuples() if row.row in at.index]
        read = [aggregation.results.samples(at.loc[row.row, "folder"], COLUMNS) for row in chosen]
        tables = [
            (row, table.to_pandas().set_index("doc_id")) for row, table in zip(chosen, read, strict=True) if table
        ]
        if len(tables) > 1 and all(table.index.is_unique for _, table in tables):
            labels = tuple(row.method if row.keep is None else f"{row.method} · {budget(row.keep)}" for row, _ in tables)
            questions = _differing([table for _, table in tables])
            blocks.append(Block(benchmark, f"{title(benchmark)}, {at['model'].iloc[0]}", labels, questions))
    return [block for block in blocks if block.questions]


def _differing(tables: Sequence[pd.DataFrame]) -> tuple[Asked, ...]:
    scores = pd.concat([table["score"] for table in tables], axis=1, join="inner")
    differ = scores.index[scores.nunique(axis=1).to_numpy() > 1][:SHOWN]
    first = tables[0]
    return tuple(
        Asked(
            int(doc),
            str(first.loc[doc, "prompt"]),
            str(first.loc[doc, "target"]),
            tuple(_given(table.loc[doc]) for table in tables),
        )
        for doc in differ
    )


def _given(row: Any) -> Given:
    whole, score = str(row["prediction"]), float(row["score"])
    mark = "✓" if score >= 1 else "✗" if score <= 0 else "◐"
    return Given(shortened(whole), whole, f"{score:.2f}".rstrip("0").rstrip("."), mark)


def shortened(text: str) -> str:
    """The beginning of a long text, and how long it is."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} letters)"
