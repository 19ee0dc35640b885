"""Timing: warm-up discarded, synchronised on both sides, fixed output length, dense and method taken in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from corematching.cost.memory import peak_memory
from corematching.engine.compiled import decoder_of, prefill
from corematching.engine.trace import SampleTrace
from corematching.methods.base import Geometry, Method, Stage
from corematching.models.families import family_of

CAPTURE_WARM_UPS = 2
"""Answers after which everything that can be captured is: prefill is when a prompt's length comes again."""


@dataclass(frozen=True)
class Spread:
    """Median and distance between the quartiles of repeated measurements."""

    median: float
    iqr: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], 0.0)
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), high - low)

    def __add__(self, other: Spread) -> Spread:
        """Of sums of independent parts, roughly."""
        return Spread(self.median + other.median, (self.iqr**2 + other.iqr**2) ** 0.5)

    def __mul__(self, times: float) -> Spread:
        return Spread(self.median * times, self.iqr * times)


@dataclass(frozen=True)
class Run:
    """One answer, or a batch's, timed. Seconds."""

    prefill: float
    """Vision tower to first token."""
    end_to_end: dict[int, float]
    """By output length: prefill and the decode steps up to it."""
    trace: SampleTrace
    """Of the batch's first prompt."""
    peak_bytes: int
    """Highest memory use during the run: allocated on a GPU, resident set of the process on a CPU."""
    engine: str
    """"eager", or "compiled" and what of it a GPU could not capture."""
    others: tuple[SampleTrace, ...] = ()
    """Traces of the batch's other prompts."""

    @property
    def samples(self) -> tuple[SampleTrace, ...]:
        """The batch's traces, one per prompt."""
        return self.trace, *self.others

    def decode_per_token(self, tokens: int) -> float | None:
        """Mean seconds per decode step of the first ``tokens`` tokens; None for one token, which needs no step."""
        return None if tokens < 2 else (self.end_to_end[tokens] - self.prefill) / (tokens - 1)


def synchronise(device: torch.device) -> None:
    """Wait for the device to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device) -> float:
    """Seconds, once the device is idle."""
    synchronise(device)
    return time.perf_counter()


def timed(work: Callable[[], Any], device: torch.device, times: int) -> list[float]:
    """Seconds of each of so many runs of a piece of work, after a warm-up."""
    work()
    seconds = []
    for _ in range(times):
        start = clock(device)
        work()
        seconds.append(clock(device) - start)
    return seconds


def answer(model: Any, trace: Any, inputs: dict[str, Tensor], lengths: list[int], engine: str) -> Run:
    device = model.device
    steps = lengths[-1] - 1
    if model._corematching.chooses_rows:  # before each step anew, which static steps cannot
        engine = "eager"
    with peak_memory(device) as peak:
        start = clock(device)
        cache, token = prefill(model, inputs, engine)
        first = clock(device) - start
        reached = {1: first}
        decoder = decoder_of(model, inputs, cache, token, steps, engine) if steps else None
        if engine == "compiled":
            del cache  # its rows were copied
        for step in range(1, steps + 1):
            assert decoder is not None
            decoder.step()
            if step + 1 in lengths:
                reached[step + 1] = clock(device) - start
    first_sample, *others = trace.drain()
    ran = _ran(engine, model._corematching, decoder)
    times = {length: reached[length] for length in lengths}
    return Run(first, times, first_sample, peak.bytes, ran, tuple(others))


def _ran(engine: str, session: Any, decoder: Any) -> str:
    """The engine as it ran: methods that a GPU cannot capture whole say which part was run from Python."""
    if engine != "compiled" or session.capture is None:
        return engine
    parts = {"prefill": session.captured is not None, "decode": decoder is None or decoder.captured}
    missed = [part for part, captured in parts.items() if not captured]
    return f"{engine} ({' and '.join(missed)} not captured)" if missed else engine


@dataclass
class Pair:
    """Runs of the dense model and of a method, taken in turns; entry i of both lists belongs together."""

    dense: list[Run] = field(default_factory=list)
    method: list[Run] = field(default_factory=list)

    def speedup(self, tokens: int) -> Spread:
        """Dense time over the method's, pair by pair, so that drift of the machine cancels."""
        both = zip(self.dense, self.method, strict=True)
        return Spread.of([dense.end_to_end[tokens] / ours.end_to_end[tokens] for dense, ours in both])

    def prefill_speedup(self) -> Spread:
        return Spread.of([dense.prefill / ours.prefill for dense, ours in zip(self.dense, self.method, strict=True)])

    def decode_speedup(self, tokens: int) -> Spread:
        both = zip(self.dense, self.method, strict=True)
        return Spread.of([dense.decode_per_token(tokens) / ours.decode_per_token(tokens) for dense, ours in both])  # type: ignore[operator]


def in_turns(
    model: Any,
    dense: Method,
    method: Method,
    inputs: dict[str, Tensor],
    output_tokens: Sequence[int],
    repeats: int,
    engine: str,
    ffn: str = "auto",
) -> Pair:
    """Time a method against dense: one of each per repeat, who goes first alternating.

    Warm-up answers are discarded. On a GPU every turn has its own two, because installing a method anew means capturing
    its prefill and decode step anew. On a CPU the first turn of each has one; later ones answer a few words without an
    image: where rows are gathered (half precision), that touches the memory they lie in.
    """
    pair = Pair()
    lengths = sorted(output_tokens)
    words = _without_image(model, inputs)
    for repeat in range(repeats):
        order = [(dense, pair.dense), (method, pair.method)]
        for subject, runs in order if repeat % 2 == 0 else order[::-1]:
            with subject(model) as trace, torch.inference_mode():
                model._corematching.build_ffn.way = ffn
                on_gpu = model.device.type == "cuda"
                for prompt in [inputs] * CAPTURE_WARM_UPS if on_gpu else [words if repeat else inputs]:
                    answer(model, trace, prompt, lengths if prompt is inputs else [1, 8], engine)
                runs.append(answer(model, trace, inputs, lengths, engine))
    return pair


def _without_image(model: Any, inputs: dict[str, Tensor], most: int = 8) -> dict[str, Tensor]:
    """The first text tokens of every prompt; all have as many."""
    ids = inputs["input_ids"]
    text = ids[ids != family_of(model.config).image_token_id(model.config)].view(len(ids), -1)[:, :most]
    return {"input_ids": text, "attention_mask": torch.ones_like(text)}


@dataclass(frozen=True)
class _Stopwatch(Method):
    """A method whose decisions are timed; everything else is as it was."""

    method: Method
    device: torch.device
    seconds: list[float] = field(default_factory=list)

    def stages(self, geometry: Geometry) -> list[Stage]:
        return [self._timed(stage) for stage in self.method.stages(geometry)]

    def _timed(self, stage: Any) -> Any:
        name = next(name for name in ("select", "merge", "predict", "choose") if hasattr(stage, name))
        decide = getattr(stage, name)

        def timed(*arguments: Any) -> Any:
            start = clock(self.device)
            decision = decide(*arguments)
            self.seconds.append(clock(self.device) - start)
            return decision

        return replace(stage, **{name: timed})


@dataclass(frozen=True)
class Decisions:
    """Seconds of every decision a method takes for one prompt, in order."""

    prefill: list[float]
    decoding: list[float]
    """Choices of neurons: those made when decoding starts, or those of one token if every token has its own."""


def decision_seconds(model: Any, method: Method, inputs: dict[str, Tensor], repeats: int = 3) -> list[Decisions]:
    """Time what a method decides for one prompt and its first decoded token, per repeat; a warm-up is discarded.

    This is the method's overhead: signals it asks for, scores, selection. Signals that the model computes anyway
    (hidden states, FFN activations, keys) cost nothing extra and are not in it.
    """
    watch = _Stopwatch(method, model.device)
    collected = []
    with watch(model), torch.inference_mode():
        for _ in range(repeats + 1):
            watch.seconds.clear()
            cache, token = prefill(model, inputs)
            before = len(watch.seconds)
            decoder_of(model, inputs, cache, token, 1, "eager").step()
            collected.append(Decisions(watch.seconds[:before], watch.seconds[before:]))
    return collected[1:]
