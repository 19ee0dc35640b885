"""The schema of a composed configuration: every part, every setting, its type and its range, in this one place.

`read_settings` is the only door: what it returns has no unknown key, no missing one, and no value that could only turn
out wrong later. Nothing here imports torch, so complaints come at once. What a method's parameters may be is the
method's own business (:mod:`corematching.methods.parameters`); whether it fits a certain model is looked at before the
weights are loaded (:mod:`corematching.evaluation.preflight`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from corematching import groups
from corematching.answering.conversation import IMAGE_MODES, PROMPTS
from corematching.benchmarks.spec import available_benchmarks
from corematching.errors import UserError
from corematching.evaluation.fields import (
    Count,
    FolderName,
    Label,
    OneOf,
    OneOrMany,
    Parameter,
    Part,
    Positive,
    Seed,
    SeveralOrNone,
    Switch,
    Text,
    Worded,
    explain,
    shown,
)
from corematching.registry import PER_IMAGE, method_defaults

RUNNERS = ("accuracy", "efficiency", "prediction", "text", "decode")
_OWN_PARTS = {
    "efficiency": ("+experiment=efficiency", ("efficiency",)),
    "hardware": ("+experiment=efficiency", ("efficiency", "prediction")),
    "prediction": ("+experiment=paper_hardware", ("prediction",)),
    "text": ("+experiment=real_language_model", ("text",)),
    "decode": ("+experiment=long_decode", ("decode",)),
}
"""Settings that some runners need and others refuse: an experiment that has them, and those runners."""
Prompt = Annotated[str, OneOf("prompt", lambda: PROMPTS)]
Image = Annotated[str, OneOf("image", lambda: IMAGE_MODES)]


# ------------------------------------------------------------------------------------------------------------- methods
def check_parameters(method: str, parameters: Mapping[str, Any]) -> None:
    """Refuse parameters that a method does not have, and several budgets where one stands."""
    known = method_defaults(method)
    for name in parameters:
        if name not in known and name != PER_IMAGE:
            raise groups.unknown(f"parameter of {method}", name, known)
    if isinstance(parameters.get("keep"), list):
        raise UserError(
            f"keep={shown(parameters['keep'])} of {method} is not valid: give one budget; the experiment's keep sweeps"
        )


def _named(entry: Any) -> Any:
    """An entry of ``methods`` may be a bare name."""
    if isinstance(entry, Mapping) and "name" in entry:
        return entry
    return {"name": entry}


class Method(Part):
    """One method; what is not named here is a parameter of it."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Parameter]

    name: Annotated[str, OneOf("method", lambda: groups.choices("method"))]
    label: Label | None = None

    @model_validator(mode="after")
    def _known(self) -> Method:
        check_parameters(self.name, self.model_extra or {})
        return self


Named = BeforeValidator(_named)


class Entry(Method):
    """One entry of ``methods``: a method, perhaps joined with a second one, with parameters by budget, with seeds."""

    seeds: Annotated[list[Seed], Field(min_length=1), Worded("a list of seeds")] | None = None
    budgets: Annotated[dict[Any, dict[str, Parameter]] | None, Worded("the parameters of each budget")] = None
    second: Annotated[Method, Named] | None = Field(None, alias="with")

    @model_validator(mode="after")
    def _known_by_budget(self) -> Entry:
        for parameters in (self.budgets or {}).values():
            check_parameters(self.name, parameters)
        if self.seeds:
            check_parameters(self.name, {"seed": self.seeds})
        return self


# --------------------------------------------------------------------------------------------------------------- parts
class Model(Part):
    """``conf/model``: which weights, and what planning must know of them."""

    name: Label
    path: Text
    revision: Text | None
    weights: Annotated[str, OneOf("weights", lambda: ("pretrained", "random"))]
    dtype: Annotated[str, OneOf("dtype", lambda: ("auto", "float32", "bfloat16", "float16"))]
    device: Annotated[
        str, StringConstraints(pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$"), Worded("auto, cpu, cuda or cuda:N")
    ]
    released_in: Annotated[str, OneOf("released_in", lambda: ("bfloat16", "float16"))] = "float16"
    num_layers: Count | None
    image_size: Annotated[list[Count], Field(min_length=2, max_length=2), Worded("[height, width]")] | None = None
    image_patches: (
        Annotated[list[Count], Field(min_length=3, max_length=3), Worded("[crops, rows, columns]")] | None
    ) = None
    visual_tokens: Count | None = None
    layers: Count | None = None
    vision_layers: Count | None = None
    prompt: Prompt
    image: Image
    batch_size: Count
    comparable: Switch = True
    text_only: Switch = False
    method_overrides: Annotated[dict[str, dict[str, Parameter]] | None, Worded("parameters by method")] = None
    architecture: Annotated[dict[str, Any] | None, Worded("the sizes of a model")] = None

    @model_validator(mode="after")
    def _consistent(self) -> Model:
        if self.num_layers and self.layers and self.num_layers > self.layers:
            raise UserError(f"model.num_layers={self.num_layers} is not valid: give 1 to {self.layers}, or null")
        for method, parameters in (self.method_overrides or {}).items():
            check_parameters(groups.known("method", method), parameters)
        return self


class Mini(Part):
    """``data=mini``: the bundled suite."""

    name: Literal["mini"]
    n: Annotated[int, Field(ge=2, le=100_000), Worded("a whole number from 2 to 100000")]
    seed: Seed
    per_image: Annotated[int, Field(ge=1, le=1000), Worded("a whole number from 1 to 1000, or null")] | None


class Hub(Part):
    """``data=hub``: the real datasets."""

    name: Literal["hub"]
    revision: Text | None


class NoJudge(Part):
    """``judge=none``."""

    name: Literal["none"]


class Judge(Part):
    """``judge=local`` or ``openai``: how to reach it, and what results say about it."""

    name: Literal["local", "openai"]
    url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s/]+"), Worded("an http(s) address")] | None
    url_env: Text | None
    key_env: Text | None
    model: Text
    timeout: Annotated[float, Field(gt=0, le=3600), Worded("seconds, above 0 and at most 3600")]
    attempts: Annotated[int, Field(ge=1, le=100), Worded("a whole number from 1 to 100")]
    note: Text

    @model_validator(mode="after")
    def _note_can_be_filled(self) -> Judge:
        try:
            self.note.format(model=self.model)
        except (LookupError, ValueError, AttributeError):
            raise UserError(
                f"judge.note={shown(self.note)} is not valid: give a text; {{model}} stands for the judge's model"
            ) from None
        return self


class Local(Part):
    """``executor=local``."""

    name: Literal["local"]
    peers: Annotated[int, Field(ge=1, le=1024), Worded("a count of at least 1")]


class Processes(Part):
    """``executor=processes``."""

    name: Literal["processes"]
    workers: Annotated[int, Field(ge=1, le=1024), Worded("a count of at least 1, or null")] | None


class OnRay(Part):
    """``executor=ray``."""

    name: Literal["ray"]
    address: Text | None
    workers: Annotated[int, Field(ge=1, le=4096), Worded("a count of at least 1, or null")] | None
    cpus: Annotated[int, Field(ge=1, le=1024), Worded("a count of at least 1")]
    tries: Annotated[int, Field(ge=1, le=100), Worded("a whole number from 1 to 100")]


class NoTracking(Part):
    """``tracking=none``."""

    name: Literal["none"]
    mode: None


class Wandb(Part):
    """``tracking=wandb`` or ``wandb_offline``."""

    name: Literal["wandb", "wandb_offline"]
    mode: Annotated[str, OneOf("tracking.mode", lambda: ("online", "offline"))]
    project: Text
    entity: Text | None
    group: Text | None


class Hardware(Part):
    """``conf/hardware``: another machine, for predictions; ``this`` states nothing."""

    name: Label
    dtype: Annotated[str, OneOf("hardware.dtype", lambda: ("float32", "bfloat16", "float16"))] | None
    flops: Annotated[dict[str, Positive] | None, Worded("FLOP/s by dtype")]
    bandwidth: Positive | None
    memory: Positive | None
    link: Positive | None

    @model_validator(mode="after")
    def _whole(self) -> Hardware:
        figures = {
            "dtype": self.dtype,
            "flops": self.flops,
            "bandwidth": self.bandwidth,
            "memory": self.memory,
            "link": self.link,
        }
        for name, value in figures.items():
            if (value is None) != (self.name == "this"):
                wording = "nothing: this machine is measured" if value else "what its data sheet says"
                raise UserError(f"hardware.{name}={shown(value)} is not valid for hardware {self.name}: give {wording}")
        if self.flops and self.dtype not in self.flops:
            raise UserError(
                f"hardware.dtype={self.dtype} has no peak on {self.name}: choose from {', '.join(self.flops)}"
            )
        return self


class Efficiency(Part):
    """How times are measured; see :class:`corematching.efficiency.rows.Protocol`."""

    output_tokens: Annotated[list[Count], OneOrMany, Field(min_length=1), Worded("whole numbers of at least 1")]
    repeats: Count
    engine: Annotated[str, OneOf("engine", lambda: ("eager", "compiled"))]
    ffn: Annotated[str, OneOf("ffn", lambda: ("auto", "native", "in_place", "gathered", "masked"))]
    batch: Annotated[list[Count], OneOrMany, Field(min_length=1), Worded("whole numbers of at least 1")]
    before: Count
    after: Count


class Prediction(Part):
    """What is predicted without being run; see :mod:`corematching.efficiency.prediction`."""

    models: Annotated[
        list[Annotated[str, OneOf("model", lambda: groups.choices("model"))]], OneOrMany, Field(min_length=1)
    ]
    output_tokens: Annotated[list[Count], OneOrMany, Field(min_length=1), Worded("whole numbers of at least 1")]
    before: Count
    after: Count


class RunningText(Part):
    """The text whose perplexity is measured, and how; see :mod:`corematching.perplexity`."""

    package: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$"), Worded("the name of a package")]
    file: Text
    title: Text
    windows: Count
    context: Count
    tokens: Count


class LongDecode(Part):
    """Prompts and answers of the long-decode road; see :mod:`corematching.longdecode`."""

    images: Annotated[list[Count], OneOrMany, Field(min_length=1), Worded("whole numbers of at least 1")]
    prompts: Count
    tokens: Annotated[int, Field(ge=2, le=100_000), Worded("a whole number of at least 2")]


class Generation(Part):
    """Settings of generation."""

    max_new_tokens: Count | None


class Features(Part):
    """States of the vision tower kept on disk; see :mod:`corematching.answering.features`."""

    cache: Annotated[Literal["auto", True, False], Worded("auto, true or false")]
    most_gb: Annotated[float, Field(gt=0, le=1e6), Worded("a number above 0")]


class Settings(Part):
    """The whole configuration."""

    name: FolderName | None
    experiment: FolderName
    runner: Annotated[str, OneOf("runner", lambda: RUNNERS)]
    model: Model
    data: Annotated[Mini | Hub, Field(discriminator="name")]
    judge: Annotated[NoJudge | Judge, Field(discriminator="name")]
    executor: Annotated[Local | Processes | OnRay, Field(discriminator="name")]
    tracking: Annotated[NoTracking | Wandb, Field(discriminator="name")]
    hardware: Annotated[list[Hardware] | None, SeveralOrNone] = None
    efficiency: Efficiency | None = None
    prediction: Prediction | None = None
    text: RunningText | None = None
    decode: LongDecode | None = None
    methods: Annotated[list[Annotated[Entry, Named]], OneOrMany]
    keep: Annotated[list[Any], OneOrMany]
    match: Annotated[str, OneOf("match", lambda: ("keep", "average"))]
    benchmarks: Annotated[list[Annotated[str, OneOf("benchmark", available_benchmarks)]], OneOrMany]
    prompt: Prompt
    image: Image
    generation: Generation
    batch_size: Count
    together: Count
    features: Features
    limit: Count | None
    seed: Seed
    shard: Annotated[int, Field(ge=0), Worded("a whole number from 0")] | None
    shards: Count | None
    controls: Annotated[Literal[True, "dense", False], Worded("true, dense or false")]
    dry_run: Switch
    force: Annotated[bool | Annotated[float, Field(ge=0)], Worded("true, false or a time in seconds since 1970")]
    results_dir: Text
    report: Switch
    debug: Switch
    command: list[str] = Field([], repr=False)  # noted by the command line, not set on it

    @model_validator(mode="after")
    def _a_share(self) -> Settings:
        if (self.shard is None) != (self.shards is None) or (self.shards or 1) <= (self.shard or 0):
            raise UserError(
                f"shard={shown(self.shard)} shards={shown(self.shards)} is not valid: give shards=N and a shard from "
                "0 to N - 1, or neither"
            )
        return self

    @model_validator(mode="after")
    def _complete(self) -> Settings:
        if not self.methods:
            raise UserError(f"methods is empty; name one or more of {', '.join(groups.choices('method'))}")
        if self.runner == "accuracy" and self.model.text_only:
            raise UserError(f"model {self.model.name} is for text only: it runs with {_OWN_PARTS['text'][0]}")
        if self.runner == "accuracy" and not self.benchmarks:
            raise UserError(f"benchmarks is empty; name one or more of {', '.join(available_benchmarks())}")
        for name, (experiment, runners) in _OWN_PARTS.items():
            if (getattr(self, name) is not None) != (self.runner in runners):
                wording = (
                    "is missing: runner={} needs it" if self.runner in runners else "is of use with runner={} only"
                )
                raise UserError(f"{name} {wording.format(' or '.join(runners))} (see {experiment})")
        return self


def read_settings(config: DictConfig) -> dict[str, Any]:
    """A composed configuration as plain values, every one of them checked.

    ``methods``, ``keep`` and ``benchmarks`` are lists, every entry of ``methods`` is a mapping with a ``name``.

    Raises
    ------
    UserError
        Names the first wrong setting, its value and what would be valid.
    """
    values = OmegaConf.to_container(config, resolve=True)
    try:
        return Settings.model_validate(values).model_dump(by_alias=True, exclude_unset=True)
    except ValidationError as error:
        raise explain(error) from None
