"""From lmms-eval's results to the number that papers quote, and to one row per question.

`value_from_samples` derives the quoted number from the per-question table alone, so that intervals and tests can
resample questions (or their clustering units) and call it again without running a model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import pandas as pd

from corematching.benchmarks.content import Content
from corematching.benchmarks.spec import MME_COGNITION, ROW, Benchmark, unit_name
from corematching.errors import UserError

_SENTENCE = re.compile(r"The answer is ([A-Z])\b")
"""How an answer to ScienceQA may name its letter in a sentence, as LLaVA's own script reads it."""


@dataclass(frozen=True)
class Score:
    """The result of one benchmark.

    Attributes
    ----------
    metric
        Name of the quoted metric, e.g. ``"F1"``.
    value
        The quoted number on `scale`; None if the benchmark could not be scored.
    scale
        The largest value possible.
    status
        ``"scored"`` or ``"not_scored"``.
    note
        What a reader of the number must know (which judge, unreadable answers, why there is no score); may be empty.
    metrics
        Further numbers: the parts of the quoted one, and what lmms-eval itself computed (``lmms_eval/<task>/<key>``).
    samples
        One row per question: doc_id (row number in the split; unique over the parts), part (subset or category), unit
        (clustering unit), question_id, question, prompt, prediction, target, score (0 to 1; NaN without a grade), and
        for test splits submission (the answer as the server wants it).
    """

    metric: str
    value: float | None
    scale: float
    status: str
    note: str
    metrics: dict[str, float]
    samples: pd.DataFrame


def score(benchmark: Benchmark, results: Mapping[str, Any]) -> Score:
    """Score one benchmark.

    Parameters
    ----------
    benchmark
        The benchmark whose tasks were run.
    results
        What ``lmms_eval.evaluator.simple_evaluate`` returned for `corematching.benchmarks.tasks.build_tasks`, with
        logged samples.

    Raises
    ------
    UserError
        If the samples of one of the benchmark's tasks are missing.
    """
    rows = []
    for part in benchmark.parts:
        samples = results.get("samples", {}).get(part.task)
        if not samples:
            raise UserError(f"{benchmark.name}: the results hold no samples of task {part.task}")
        rows += [_sample_row(benchmark, part.split, sample) for sample in samples]
    table = pd.DataFrame(rows).sort_values("doc_id", ignore_index=True)
    value, metrics = value_from_samples(benchmark, table)
    for part in benchmark.parts:
        metrics |= _stock_metrics(part.task, results.get("results", {}).get(part.task, {}))
    return Score(
        metric=benchmark.metric.name,
        value=value,
        scale=benchmark.metric.scale,
        status="not_scored" if value is None else "scored",
        note=_note(benchmark, table, value),
        metrics=metrics,
        samples=table.drop(columns=["judge", "reason", "precision", "recall", "count"], errors="ignore"),
    )


def value_from_samples(benchmark: Benchmark, samples: pd.DataFrame) -> tuple[float | None, dict[str, float]]:
    """Derive the quoted number from per-question rows.

    Parameters
    ----------
    benchmark
        Selects the recipe (``benchmark.metric.kind``).
    samples
        Rows as in `Score.samples`; any resampling of whole units will do, if each drawn unit has its own name.

    Returns
    -------
    tuple
        The number on the metric's scale, or None if a row has no score, and the numbers it is made of.
    """
    if samples["score"].isna().any():
        return None, {}
    return _RECIPES[benchmark.metric.kind](samples)


def _mean(samples: pd.DataFrame) -> tuple[float, dict[str, float]]:
    return 100.0 * float(samples["score"].mean()), {}


def _by_part(samples: pd.DataFrame) -> tuple[float, dict[str, float]]:
    parts = samples.groupby("part")["score"].mean()
    return 100.0 * float(samples["score"].mean()), {str(part): 100.0 * float(value) for part, value in parts.items()}


def _pope(samples: pd.DataFrame) -> tuple[float, dict[str, float]]:
    """Mean F1 of the subsets; answers that are neither yes nor no count as misses, in recall as well."""
    said = samples["prediction"].str.strip().str.lower()
    metrics: dict[str, float] = {"accuracy": 100.0 * float(samples["score"].mean())}
    metrics["yes_ratio"] = 100.0 * float((said == "yes").mean())
    metrics["invalid"] = 100.0 * float((~said.isin(["yes", "no"])).mean())
    scores = []
    for part, rows in samples.groupby("part", sort=False):
        yes, true = said[rows.index] == "yes", rows["target"] == "yes"
        hits = int((yes & true).sum())
        scores.append(100.0 * 2 * hits / max(1, int(yes.sum()) + int(true.sum())))
        metrics[f"f1_{part}"] = scores[-1]
    return sum(scores) / len(scores), metrics


def _mme(samples: pd.DataFrame) -> tuple[float | None, dict[str, float]]:
    """Per subtask: accuracy plus the share of images with both questions right, each of 100; quoted is perception."""
    both = samples.groupby(["part", "unit"])["score"].min().groupby(level="part").mean()
    subtasks = 100.0 * (samples.groupby("part")["score"].mean() + both)
    is_cognition = subtasks.index.isin(MME_COGNITION)
    cognition, total = float(subtasks[is_cognition].sum()), float(subtasks.sum())
    metrics = {str(name): float(value) for name, value in subtasks.items()}
    perception = None if is_cognition.all() else float(subtasks[~is_cognition].sum())
    return perception, {"perception": perception or 0.0, "cognition": cognition, "total": total, **metrics}


def _mmbench(samples: pd.DataFrame) -> tuple[float, dict[str, float]]:
    """A question is right if all rotations of its options are."""
    questions = samples.groupby("unit").agg(score=("score", "min"), part=("part", "first"))
    value, metrics = _by_part(questions)
    return value, {"single_rotation": 100.0 * float(samples["score"].mean()), **metrics}


def _mmvet(samples: pd.DataFrame) -> tuple[float, dict[str, float]]:
    """Mean grade; per capability the mean over the questions that need it."""
    needs = samples["part"].str.split(",")
    names = sorted({name for row in needs for name in row})
    share = {name: samples["score"][needs.map(lambda row, name=name: name in row)].mean() for name in names}
    return 100.0 * float(samples["score"].mean()), {name: 100.0 * float(value) for name, value in share.items()}


def _submission(samples: pd.DataFrame) -> tuple[None, dict[str, float]]:
    return None, {}


def _content(samples: pd.DataFrame) -> tuple[float, dict[str, float]]:
    """Mean over the answers of the harmonic mean of precision and recall; both, and what else is known, apart."""
    known = [name for name in ("precision", "recall", "count") if name in samples]
    return 100.0 * float(samples["score"].mean()), {name: 100.0 * float(samples[name].mean()) for name in known}


_RECIPES: dict[str, Callable[[pd.DataFrame], tuple[float | None, dict[str, float]]]] = {
    "chair": _content,
    "content": _content,
    "exact_match": _mean,
    "letter": _by_part,
    "mmbench": _mmbench,
    "mme": _mme,
    "mmvet": _mmvet,
    "pope": _pope,
    "scienceqa": _mean,
    "seedbench": _by_part,
    "submission": _submission,
}


def _sample_row(benchmark: Benchmark, split: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    doc = sample["doc"]
    row = {
        "doc_id": int(doc[ROW]),
        "part": str(doc[benchmark.category]) if benchmark.category else (split if len(benchmark.parts) > 1 else ""),
        "unit": unit_name(benchmark, doc),
        "question_id": str(doc.get("question_id", doc[ROW])),
        "question": doc.get("question", ""),
        "prompt": sample["arguments"][0],
        "prediction": str(sample["filtered_resps"][0]),
        "target": str(sample["target"]),
        "score": float("nan"),
    }
    match benchmark.metric.kind:
        case "exact_match":
            row["score"] = float(sample["exact_match"])
            if "answers" in doc:
                row["target"] = _majority(doc["answers"])
        case "content":
            record = dict(sample["content"])
            row |= {"score": record.pop("f1"), **record}
        case "chair":
            record = sample["coco_cap_chair_i"]
            found = Content.of(sorted(set(record["pred"])), sorted(set(record["answer"])))
            row |= {"score": found.f1, "precision": found.precision, "recall": found.recall}
            row["target"] = "; ".join(record["answer"])
        case "letter":
            record = sample["muirbench_score_overall"]
            row["score"] = float(record["pred"].strip().lower() == record["answer"].strip().lower())
        case "scienceqa":
            row["score"] = max(float(sample["exact_match"]), said_in_a_sentence(row["prediction"], row["target"]))
        case "submission":
            row["submission"] = str(sample["submission"]["answer"])
        case "pope":
            row["score"] = float(sample["pope_accuracy"]["score"])
        case "mme":
            record = sample.get("mme_perception_score") or sample["mme_cognition_score"]
            row["score"] = float(record["score"])
        case "seedbench":
            record = sample["seed_all"]
            row["score"] = float(record["pred"].strip().lower() == record["answer"].strip().lower())
        case "mmbench":
            row["score"] = float(sample["gpt_eval_score"]["correct"])
        case "mmvet":
            record = sample["gpt_eval_score"]
            row["score"] = float(record["score"])
            row |= {"judge": record["judge"], "reason": record["reason"]}
    return row


def said_in_a_sentence(prediction: str, letter: str) -> float:
    """1 if an answer says "The answer is X" of the right letter and of no other, and begins with no letter, else 0."""
    begins = re.match(r"[A-Z]\.", prediction.strip()) is not None
    return float(not begins and set(_SENTENCE.findall(prediction)) == {letter.strip().upper()})


def _majority(answers: list[Any]) -> str:
    texts = [answer["answer"] if isinstance(answer, Mapping) else answer for answer in answers]
    return Counter(texts).most_common(1)[0][0] if texts else ""


def _stock_metrics(task: str, results: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for key, value in results.items():
        name, _, filter_name = key.partition(",")
        if filter_name == "none" and "_stderr" not in name and isinstance(value, Real) and not isinstance(value, bool):
            found[f"lmms_eval/{task}/{name}"] = float(value)
    return found


def _note(benchmark: Benchmark, table: pd.DataFrame, value: float | None) -> str:
    match benchmark.metric.kind:
        case "mme":
            wanted = set(map(str, benchmark.columns["category"].values)) - set(MME_COGNITION)
            missing = len(wanted - set(table["part"]))
            return f"{missing} of {len(wanted)} perception subtasks left out by the limit" if missing else ""
        case "submission":
            return f"scored by the {benchmark.needs_server} server; scripts/score.py writes the file for it"
        case "pope":
            invalid = int((~table["prediction"].str.strip().str.lower().isin(["yes", "no"])).sum())
            return f"{invalid} of {len(table)} answers were neither yes nor no and count as wrong" if invalid else ""
        case "mmvet":
            if value is not None:
                return str(table["judge"].iloc[0])
            missing = table[table["score"].isna()]
            return f"{len(missing)} of {len(table)} answers not graded: {missing['reason'].iloc[0]}"
    return ""
