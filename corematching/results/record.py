"""The schema of ``cell.json``: what every reader of a store may rely on, checked in this one place.

Fields that are not named here may stand in a record and reach nobody.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator


def _encodable(text: str) -> str:
    """Refuse halves of surrogate pairs: no table could be written with them."""
    text.encode("utf-8")
    return text


#: Finite, and small enough that sums and units cannot overflow.
Number = Annotated[float, Field(ge=-1e30, le=1e30)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Word = Annotated[str, AfterValidator(_encodable)]
Text = Word | None


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class Model(_Part):
    """Part of ``config``: which weights."""

    name: Word
    path: Text = None
    revision: Text = None
    dtype: Text = None
    weights: Text = None
    num_layers: Count | None = None


class Named(_Part):
    """Part of ``config``: a method; its parameters are its own."""

    name: Word


class Benchmark(Named):
    """Part of ``config``: which questions."""

    data: Text = None
    version: Text = None
    limit: Count | None = None


class Config(_Part):
    """What the cell's id is the hash of."""

    model: Model
    method: Named
    benchmark: Benchmark
    prompt: Text = None
    image: Text = None
    seed: Count | None = None


class Labels(_Part):
    """How tables call the cell."""

    model: Word
    method: Word
    benchmark: Word
    data: Word
    keep: Number | Word | None


class Score(_Part):
    """The number a paper would quote, on its scale."""

    metric: Word
    value: Number | None
    scale: Number
    note: Word


class Flops(_Part):
    """Per sample, 2 per multiply-add."""

    prefill: Number
    vision: Number | None = None
    projector: Number | None = None
    decode: Number | None = None
    lm_head: Number | None = None
    overhead: Number | None = None
    total: Number | None = None


class Trace(_Part):
    """Means over samples of what really ran."""

    visual_tokens_per_layer: Number
    kv_bytes: Number
    flops: Flops
    flops_conventions: dict[Word, Number] = {}
    image_tokens: Number | None = None
    tokens_entering_llm: Number | None = None
    dense_kv_bytes: Number | None = None
    rows_read: Number | None = None
    rows_held: Number | None = None
    mass_read: Number | None = None
    generated_tokens: Number | None = None
    ended_answers: Count | None = None
    capped_answers: Count | None = None
    cap: Count | None = None
    visual_tokens_by_layer: list[Number] = []
    neurons_by_layer: list[Number | None] = []


class Bench(_Part):
    """A row of the efficiency road: numbers, apart from the fields named here."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[Word, Number | None]

    regime: Word
    output_tokens: Count
    predicted: bool
    device: Text = None
    engine: Text = None
    dense_engine: Text = None
    dtype: Text = None


class Hardware(_Part):
    """The machine."""

    cpu: Text
    gpu: Text
    cores: Count | None = None
    threads: Count | None = None


class Provenance(_Part):
    """Where the number comes from."""

    versions: dict[Word, Word]
    hardware: Hardware
    git_commit: Text = None
    started: Text = None
    finished: Text = None


class Timing(_Part):
    """Seconds; of cells that were answered together, each one's own share."""

    seconds: Number
    model_seconds: Number | None = None
    """Spent on answers. Cells answered together share their time in proportion to the FLOPs of each as if alone."""
    cells_together: Count = 1
    """Cells that were answered together, this one included."""


class Failure(_Part):
    """The exception that ended a cell."""

    type: Word
    message: Word
    traceback: Word


class Record(_Part):
    """A whole ``cell.json``."""

    kind: Literal["accuracy", "efficiency"]
    id: Word
    status: Literal["done", "failed", "not_scored"]
    config: Config
    labels: Labels
    timing: Timing
    provenance: Provenance
    metrics: dict[Word, Number | None] = {}
    score: Score | None = None
    n: Count = 0
    trace: Trace | None = None
    error: Failure | None = None
    bench: Bench | None = None

    @model_validator(mode="after")
    def _holds_what_its_status_says(self) -> Record:
        needed: dict[str, Any]
        if self.status == "failed":
            needed = {"error": self.error}
        elif self.kind == "efficiency":
            needed = {"bench": self.bench}
        else:
            needed = {"score": self.score}
            if self.status == "done":
                needed |= {"trace": self.trace, "score.value": self.score and self.score.value}
        missing = [name for name, value in needed.items() if value is None]
        if missing:
            raise ValueError(f"it is {self.status} without {missing[0]}")
        return self


def problem(record: Any) -> str | None:
    """Why `record` is none that readers can use, in one line; None if it is one."""
    try:
        Record.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where or 'cell.json'}: {first['msg']}"[:300]
    return None
