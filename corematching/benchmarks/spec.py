"""What a benchmark is: the facts of ``conf/benchmark/<name>.yaml``, read once and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

import corematching
from corematching.errors import UserError

CONF_DIR = Path(corematching.__file__).parent.parent / "conf"

#: The ten benchmarks of the paper, in the order in which its tables print them.
BENCHMARKS = ("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench", "seedbench", "mmvet")

#: Column that reading adds to every row: its number in the whole split, whatever the limit.
ROW = "_row"

COLUMN_TYPES = ("any", "image", "images", "int", "records", "text", "texts")
METRIC_KINDS = (
    "chair",
    "content",
    "exact_match",
    "letter",
    "mmbench",
    "mme",
    "mmvet",
    "pope",
    "scienceqa",
    "seedbench",
    "submission",
)
#: MME's four cognition subtasks; the papers quote the sum over the other ten.
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


@dataclass(frozen=True)
class Column:
    """One column that the scoring code reads.

    Attributes
    ----------
    type
        One of `COLUMN_TYPES`: ``text``, ``texts`` (a list of texts), ``int``, ``image``, ``images`` (a list),
        ``records`` (a list of structs with `fields`) or ``any``.
    nullable
        Whether a row may hold nothing here.
    values
        The only values allowed; empty means any.
    fields
        Names that every struct of a ``records`` column must have.
    """

    type: str
    nullable: bool = False
    values: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()

    @property
    def is_media(self) -> bool:
        return self.type in ("image", "images")


@dataclass(frozen=True)
class Part:
    """One lmms-eval task of a benchmark (POPE has three, the others one).

    `tasks_dir` is the folder of lmms-eval that holds the task ("bundled": it is one of
    `corematching.benchmarks.content`), `files` a glob relative to the dataset repository.
    """

    task: str
    tasks_dir: str
    split: str
    files: str


@dataclass(frozen=True)
class ImageTable:
    """Images kept apart from the questions (GQA): row `id` of the image table belongs to question column `key`."""

    files: str
    split: str
    key: str
    id: str
    column: str


@dataclass(frozen=True)
class Metric:
    """How the number that papers quote is derived; `kind` selects the recipe in `corematching.benchmarks.scoring`."""

    kind: str
    name: str
    scale: float
    derivation: str


@dataclass(frozen=True)
class Prompt:
    """One way of asking: `text` and `visual` name functions of `corematching.benchmarks.prompts`.

    None keeps lmms-eval's own. `max_new_tokens` None keeps
    lmms-eval's generation settings; a number means greedy decoding up to that length.
    """

    text: str | None = None
    visual: str | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: where its rows are, how it is asked, and how the quoted number comes about.

    Attributes
    ----------
    unit
        Column(s) that name the clustering unit of a row (an image, an MME pair, an MMBench question).
    unit_modulo
        MMBench numbers the rotations of question i as i + k * modulo; None elsewhere.
    unit_size
        Rows that a complete unit must have; None if units may differ.
    category
        Column that becomes ``part`` in the per-question table; None where the subset name is used.
    questions
        Number of questions of the real split.
    """

    name: str
    title: str
    repo: str
    questions: int
    parts: tuple[Part, ...]
    columns: Mapping[str, Column]
    metric: Metric
    prompts: Mapping[str, Prompt]
    source: str
    licence: str
    images: ImageTable | None = None
    unit: tuple[str, ...] = ()
    unit_modulo: int | None = None
    unit_size: int | None = None
    category: str | None = None
    needs_judge: bool = False
    needs_server: str | None = None

    @property
    def folder(self) -> str:
        """Name of the dataset repository without its owner, e.g. ``"POPE"``."""
        return self.repo.split("/")[-1]

    @property
    def bundled(self) -> bool:
        """Whether it exists in the mini suite alone."""
        return self.repo.startswith("mini/")

    def prompt(self, name: str) -> Prompt:
        """Return the prompt variant `name`; raises `UserError` naming the valid ones."""
        if name not in self.prompts:
            valid = ", ".join(self.prompts)
            raise UserError(f"unknown prompt {name!r} for benchmark {self.name}; valid prompts: {valid}")
        return self.prompts[name]


def unit_name(benchmark: Benchmark, doc: Mapping[str, Any]) -> str:
    """Name of the clustering unit of a row: its image, MME pair or MMBench question; its number if it stands alone."""
    if not benchmark.unit:
        return str(doc[ROW])
    if benchmark.unit_modulo:
        return str(int(doc[benchmark.unit[0]]) % benchmark.unit_modulo)
    return "/".join(str(doc[column]) for column in benchmark.unit)


def available_benchmarks() -> tuple[str, ...]:
    """Names of all benchmarks: the paper's ten first, then the extras."""
    names = sorted(path.stem for path in (CONF_DIR / "benchmark").glob("*.yaml"))
    return BENCHMARKS + tuple(name for name in names if name not in BENCHMARKS)


@cache
def load_benchmark(name: str) -> Benchmark:
    """Read ``conf/benchmark/<name>.yaml``.

    Raises
    ------
    UserError
        If there is no such benchmark (the message names the valid ones) or its file is not well-formed.
    """
    path = CONF_DIR / "benchmark" / f"{name}.yaml"
    if name not in available_benchmarks():
        raise UserError(f"unknown benchmark {name!r}; valid benchmarks: {', '.join(available_benchmarks())}")
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return _parse(raw)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path.name}: {error}") from error


def _parse(raw: dict[str, Any]) -> Benchmark:
    raw = dict(raw)
    metric = Metric(**raw.pop("metric"))
    if metric.kind not in METRIC_KINDS:
        raise ValueError(f"unknown metric kind {metric.kind!r}; valid kinds: {', '.join(METRIC_KINDS)}")
    images = raw.pop("images", None)
    unit = raw.pop("unit", [])
    return Benchmark(
        parts=tuple(Part(**part) for part in raw.pop("parts")),
        columns={name: _column(name, value) for name, value in raw.pop("columns").items()},
        metric=metric,
        prompts={name: Prompt(**(value or {})) for name, value in raw.pop("prompts").items()},
        images=ImageTable(**images) if images else None,
        unit=(unit,) if isinstance(unit, str) else tuple(unit),
        **raw,
    )


def _column(name: str, value: str | dict[str, Any]) -> Column:
    settings: dict[str, Any] = {"type": value} if isinstance(value, str) else dict(value)
    if settings["type"] not in COLUMN_TYPES:
        raise ValueError(f"column {name}: unknown type {settings['type']!r}; valid types: {', '.join(COLUMN_TYPES)}")
    settings["values"] = tuple(settings.get("values", ()))
    settings["fields"] = tuple(settings.get("fields", ()))
    return Column(**settings)
