"""lmms-eval task objects for a benchmark: stock prompts, stock scoring, our rows.

What differs from running lmms-eval's own task by name, and why:

- Rows come from `corematching.benchmarks.rows`: checked, never stale, cut to whole scoring units.
- Nothing is retried. Stock repeats a failing read or scoring step five times and then hides its cause.
- GQA's images are looked up per row instead of being copied into every row by eight processes.
- MMBench is scored by rules only. Stock asks a GPT and, where that fails, draws a random letter.
- MM-Vet asks `corematching.benchmarks.judge`, whose time is bounded; without a grade there is no score.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd

from corematching.benchmarks import content, lmms, prompts
from corematching.benchmarks.data import DataSource
from corematching.benchmarks.judge import Grade, Judge, mmvet_prompt
from corematching.benchmarks.rows import CheckedDataset, load_images, load_rows
from corematching.benchmarks.spec import ROW, Benchmark, ImageTable, Part, Prompt, load_benchmark
from corematching.errors import UserError

_STOCK_TASKS = Path(lmms.tasks.__file__).parent
_DECODED = 64
"""Images of a table apart from the questions that stay decoded."""


class BenchmarkTask(lmms.ConfigurableTask):
    """A stock lmms-eval task on rows that are already here."""

    def __init__(self, config: dict[str, Any], rows: CheckedDataset) -> None:
        self._rows = rows
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Hand over the rows; nothing is downloaded and nothing is retried."""
        media = [name for name, feature in self._rows.features.items() if "Image" in repr(feature)]
        self.dataset = {self.config.test_split: self._rows}
        self.dataset_no_image = {self.config.test_split: self._rows.remove_columns(media)}

    def doc_to_text(self, doc: dict[str, Any], *arguments: Any) -> Any:
        """The prompt of one row, made by the stock code; a failure names the row."""
        try:
            return super().doc_to_text(doc, *arguments)
        except Exception as error:
            where = f"{self._rows.where}, row {doc.get(ROW)}"
            raise UserError(f"{where}: no prompt can be made ({type(error).__name__}: {error})") from error

    def process_results(self, doc: dict[str, Any], results: list, full_docs: Any = None) -> dict[str, Any]:
        """Score one answer with the stock code, once; a failure names the row."""
        try:
            return lmms.ConfigurableTask.process_results.__wrapped__(self, doc, results, full_docs)
        except Exception as error:
            where = f"{self._rows.where}, row {doc.get(ROW)}"
            raise UserError(f"{where}: scoring failed with {type(error).__name__}: {error}") from error


def build_tasks(
    benchmark: Benchmark,
    source: DataSource,
    prompt: str = "llava15",
    limit: int | None = None,
    judge: Judge | None = None,
    max_new_tokens: int | None = None,
) -> list[BenchmarkTask]:
    """Build the lmms-eval tasks of a benchmark (three for POPE, one for the others).

    Parameters
    ----------
    benchmark
        From `corematching.benchmarks.load_benchmark`.
    source
        Where the rows come from.
    prompt
        Prompt mode, a key of ``benchmark.prompts``.
    limit
        Questions to ask in all, spread over the parts; see `corematching.benchmarks.rows.load_rows`. Do not give
        lmms-eval a limit of its own.
    judge
        Grades MM-Vet's answers. None records the answers without a score.
    max_new_tokens
        Upper bound on top of the mode's own; None leaves it alone.

    Raises
    ------
    UserError
        If the prompt is unknown, the limit is not positive, or the data is missing or not well-formed.
    """
    variant = benchmark.prompt(prompt)
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise UserError(f"limit={limit!r} is not usable; it is a positive number of questions, or null for all")
    root = source.root(benchmark)
    tasks: list[BenchmarkTask] = []
    first = 0
    for index, part in enumerate(benchmark.parts):
        rows = load_rows(benchmark, part, root, _share(limit, index, len(benchmark.parts)), first)
        first += rows.total
        config = _config(benchmark, part, variant, judge, max_new_tokens)
        if benchmark.images is not None:
            config["doc_to_visual"] = _image_lookup(benchmark, benchmark.images, root, rows)
        tasks.append(BenchmarkTask(config, rows))
    return tasks


def _share(limit: int | None, index: int, parts: int) -> int | None:
    if limit is None:
        return None
    return max(1, limit // parts + (index < limit % parts))


def stock_config(part: Part) -> dict[str, Any]:
    """The configuration of lmms-eval's own task (or of a bundled one), with its functions loaded."""
    if part.tasks_dir == content.TASKS_DIR:
        return content.task_config(part.task)
    with _no_stock_judge():
        return dict(_manager(part.tasks_dir)._get_config(part.task))


@functools.cache
def _manager(tasks_dir: str) -> Any:
    # Indexing this one folder takes a tenth of a second, all of lmms-eval's tasks five.
    return lmms.tasks.TaskManager(include_defaults=False, include_path=[str(_STOCK_TASKS / tasks_dir)])


@contextlib.contextmanager
def _no_stock_judge() -> Iterator[None]:
    """Let stock task files load without a key, and keep any real key and address out of their module globals."""
    with patch.dict(os.environ, {"API_TYPE": "dummy"}):
        yield


def _config(
    benchmark: Benchmark, part: Part, variant: Prompt, judge: Judge | None, max_new_tokens: int | None
) -> dict[str, Any]:
    config = stock_config(part)
    config.update(dataset_path=None, dataset_name=None, dataset_kwargs=None, process_docs=None)
    if variant.text is not None:
        text = prompts.named("text", variant.text)
        config.update(doc_to_text=lambda doc, _kwargs=None: text(doc))
    if variant.visual is not None:
        config.update(doc_to_visual=prompts.named("visual", variant.visual))
    generation = dict(config.get("generation_kwargs") or {})
    if variant.max_new_tokens is not None:
        generation = {"max_new_tokens": variant.max_new_tokens, "do_sample": False, "temperature": 0, "num_beams": 1}
        generation["until"] = []
        config.pop("model_specific_generation_kwargs", None)
    if max_new_tokens is not None:
        generation["max_new_tokens"] = min(max_new_tokens, generation.get("max_new_tokens", max_new_tokens))
    config["generation_kwargs"] = generation
    if benchmark.metric.kind == "chair":
        _check_nltk()
    if benchmark.metric.kind == "mmbench":
        _score_by_rules(config)
    if benchmark.metric.kind == "mmvet":
        _score_by_judge(config, judge)
    return config


def _check_nltk() -> None:
    """Refuse before a run what CHAIR's scoring would stumble over behind it: NLTK's data are no part of the package."""
    import nltk

    try:
        for name in ("tokenizers/punkt_tab", "taggers/averaged_perceptron_tagger_eng", "corpora/wordnet.zip"):
            nltk.data.find(name)
    except LookupError:
        raise UserError(
            "coco_chair needs NLTK's data to read answers: "
            "run python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet"
        ) from None


def _image_lookup(benchmark: Benchmark, table: ImageTable, root: Path, rows: CheckedDataset) -> Callable[[dict], list]:
    """Check that every question's image is there; returns a function that fetches the image of a row."""
    images, row_of = load_images(benchmark, table, root)
    for number, key in zip(rows[ROW], rows[table.key]):
        if key not in row_of:
            raise UserError(f"{rows.where}, row {number}, column {table.key}: there is no image {key!r}")

    @functools.lru_cache(maxsize=_DECODED)  # questions about one image mostly stand together
    def decoded(row: int) -> Any:
        return images[row][table.column]

    return lambda doc: [decoded(row_of[doc[table.key]]).convert("RGB")]


def _score_by_rules(config: dict[str, Any]) -> None:
    """Score MMBench with lmms-eval's letter rules alone, and record for every row whether it is right.

    Stock has this for English only. Options that are absent may be stored as the text "nan"; stock then looks for
    "nan" inside answers, so they are made absent here.
    """
    stock = config["process_results"]
    evaluator = stock.__globals__["mmbench_evaluator"]

    def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
        record = stock(doc, results)["gpt_eval_score"]
        record.update({letter: None for letter in "ABCDE" if record[letter] in (None, "", "nan")})
        answers = {record["index"]: record["answer"]}
        record["correct"] = evaluator.eval_sub_data(pd.DataFrame([record]), answers, static_only=True)
        return {"gpt_eval_score": record}

    def aggregate(records: list[dict[str, Any]]) -> float:
        with contextlib.redirect_stdout(io.StringIO()):  # stock prints a table per category
            return float(evaluator.eval_result(records, eval_method="static")[0]) * 100

    config["process_results"] = process_results
    config["metric_list"] = [{"metric": "gpt_eval_score", "aggregation": aggregate, "higher_is_better": True}]


def mmvet_instructions() -> str:
    """The instructions and examples that lmms-eval gives MM-Vet's judge."""
    part = load_benchmark("mmvet").parts[0]
    return stock_config(part)["process_results"].__globals__["MM_VET_PROMPT"]


def _number(grade: Grade) -> float:
    return math.nan if grade.score is None else grade.score  # lmms-eval does arithmetic on it


def _score_by_judge(config: dict[str, Any], judge: Judge | None) -> None:
    """Grade MM-Vet's answers with `judge`; without a grade the score is NaN, and there is no total."""
    instructions = config["process_results"].__globals__["MM_VET_PROMPT"]
    stock_aggregate = config["metric_list"][0]["aggregation"]

    def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
        if judge is None:
            grade = Grade(None, "no judge")
        else:
            grade = judge.grade(mmvet_prompt(instructions, doc["question"], doc["answer"], results[0]))
        record = {"question_id": doc["question_id"], "question": doc["question"], "gt_answer": doc["answer"]}
        record |= {"capabilities": doc["capability"], "pred_answer": results[0], "score": _number(grade)}
        record |= {"reason": grade.reason, "judge": judge.note if judge else ""}
        return {"gpt_eval_score": record}

    def aggregate(records: list[dict[str, Any]]) -> float | None:
        return None if any(math.isnan(record["score"]) for record in records) else stock_aggregate(records)

    config["process_results"] = process_results
    config["metric_list"] = [{"metric": "gpt_eval_score", "aggregation": aggregate, "higher_is_better": True}]
