"""Scoring long answers by their exact content: which objects an answer names, and which it should.

The bundled tasks that lmms-eval has not are defined here as it defines its own; those it has are scored by its code.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from corematching.benchmarks.mini.scenes import COLOURS, DIGITS, SHAPES, WORDS

KINDS = frozenset({*SHAPES, *DIGITS, *WORDS})
REACH = 6
"""Words between a colour and what has it, at most ("red sign that says the word cat")."""
TASKS_DIR = "bundled"
"""What ``conf/benchmark`` names as the folder of these tasks."""


@dataclass(frozen=True)
class Content:
    """How what an answer names compares with what is there: shares between 0 and 1."""

    precision: float
    recall: float

    @classmethod
    def of(cls, named: Sequence[Any], shown: Sequence[Any]) -> Content:
        """Objects named several times count as often; nothing named is precision 0, unless nothing is there."""
        if not shown:
            return cls(float(not named), 1.0)
        hits = (Counter(named) & Counter(shown)).total()
        return cls(hits / len(named) if named else 0.0, hits / len(shown))

    @property
    def f1(self) -> float:
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def objects_named(text: str) -> list[tuple[str, str]]:
    """Pairs of colour and kind in the order of a text: each colour with the next kind behind it, if one is near."""
    words = re.findall(r"[a-z]+|\d+", text.lower())
    found, colour, since = [], None, 0
    for word in words:
        since += 1
        if word in COLOURS:
            colour, since = word, 0
        elif word in KINDS and colour is not None and since <= REACH:
            found.append((colour, word))
            colour = None
    return found


def last_number(text: str) -> str | None:
    """The last number of a text that does not say what a coloured object is."""
    loose = re.sub(rf"({'|'.join(COLOURS)})\s+\d", "", text.lower())
    numbers = re.findall(r"\d+", loose)
    return numbers[-1] if numbers else None


def process(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Score one answer: what lmms-eval calls for every question."""
    content = Content.of(objects_named(results[0]), objects_named(doc["answer"]))
    record: dict[str, Any] = {"precision": content.precision, "recall": content.recall, "f1": content.f1}
    _, colon, number = doc["answer"].rpartition(":")
    if colon:
        record["count"] = float(last_number(results[0]) == number.strip())
    return {"content": record}


def task_config(task: str) -> dict[str, Any]:
    """The configuration of a bundled task, in lmms-eval's terms."""
    return {
        "task": task,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_visual": lambda doc: [image.convert("RGB") for image in doc["image"]],
        "doc_to_text": lambda doc, _kwargs=None: doc["question"],
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": 256, "do_sample": False, "temperature": 0, "until": []},
        "process_results": process,
        "metric_list": [{"metric": "content", "aggregation": _mean_f1, "higher_is_better": True}],
    }


def _mean_f1(records: list[dict[str, float]]) -> float:
    return 100.0 * sum(record["f1"] for record in records) / len(records)
