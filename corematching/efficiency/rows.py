"""Efficiency rows: what a method's runs amount to, beside dense runs taken in turns and this machine's peaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from corematching.cost.calibration import Calibration, calibrated
from corematching.cost.flops import flops
from corematching.cost.hardware import dtype_name, this_machine
from corematching.cost.roofline import Hardware, Prediction, at_depth, decode_bytes, in_dtype, predict
from corematching.efficiency.latency import Pair, Run, Spread, decision_seconds, in_turns
from corematching.efficiency.peaks import Peaks
from corematching.engine.compiled import ENGINES
from corematching.engine.trace import SampleTrace
from corematching.engine.ways import WAYS
from corematching.errors import UserError
from corematching.methods.base import Method


@dataclass(frozen=True)
class Protocol:
    """How rows are measured.

    Parameters
    ----------
    output_tokens
        Forced answer lengths. One answer of the largest length serves all of them.
    repeats
        Timed answers per method, and as many dense ones beside them; warm-ups are discarded.
    engine
        "eager" or "compiled" (prefill and decode), for dense and method alike; under a memory budget, whoever streams
        weights in decode is eager.
    before, after
        Text tokens around the visual tokens of the prompt.
    ffn
        How chosen neurons are computed on a CPU, see :data:`corematching.engine.ways.WAYS`; "auto" measures.
    batch
        Prompts answered together, each with text and an image of its own; every size is measured apart.
    """

    output_tokens: tuple[int, ...] = (1, 32, 128)
    repeats: int = 10
    engine: str = "compiled"
    before: int = 35
    after: int = 40
    ffn: str = "auto"
    batch: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.ffn not in WAYS:
            raise UserError(f"ffn={self.ffn!r} is not valid: choose from {', '.join(WAYS)}")
        if self.engine not in ENGINES:
            raise UserError(f"engine={self.engine!r} is not valid: choose from {', '.join(ENGINES)}")
        counts = {"repeats": (self.repeats,), "output_tokens": self.output_tokens, "batch": self.batch}
        for name, values in {**counts, "before": (self.before,), "after": (self.after,)}.items():
            if not values or any(
                not isinstance(value, int) or isinstance(value, bool) or value < 1 for value in values
            ):
                raise UserError(f"{name}={list(values)} is not valid: give whole numbers of at least 1")


@dataclass
class Measured:
    """Everything measured of one method in one regime."""

    pair: Pair
    overhead: Spread
    """Seconds a prefill spends on the method's decisions."""
    choice: Spread = field(default_factory=lambda: Spread(0.0, 0.0))
    """Seconds that choosing neurons takes when decoding starts; for every token, if every token has its own."""
    streamed_bytes: int = 0
    """Bytes one answer of the largest length streams from the host (memory-limited regime)."""
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By output length."""

    @property
    def trace(self) -> SampleTrace:
        return self.pair.method[-1].trace

    @property
    def samples(self) -> tuple[SampleTrace, ...]:
        """Traces of a batch, one per prompt."""
        return self.pair.method[-1].samples


def measure(
    model: Any,
    dense: Method,
    method: Method,
    inputs: dict[str, Tensor],
    protocol: Protocol,
    peaks: Peaks,
    known: Calibration | None = None,
) -> Measured:
    """Time a method (or dense itself) with everything resident, and hold predictions against it.

    Parameters
    ----------
    known
        What kernels of the model's shapes take here, for a second prediction beside the roofline model's.
    """
    lengths, repeats = protocol.output_tokens, protocol.repeats
    pair = in_turns(model, dense, method, inputs, lengths, repeats, protocol.engine, protocol.ffn)
    measured = Measured(pair, Spread(0.0, 0.0))
    if method.acts_on:
        decisions = decision_seconds(model, method, inputs)
        measured.overhead = Spread.of([sum(one.prefill) for one in decisions])
        measured.choice = Spread.of([sum(one.decoding) for one in decisions])
    here = this_machine(peaks, model.dtype, model.device)
    for tokens in protocol.output_tokens:
        row = measured.rows[tokens] = row_of(model.config, measured, tokens, peaks, model.dtype)
        guess = predict(model.config, measured.samples, here, dtype_name(model.dtype), tokens)
        row |= _errors("predicted", guess, row, tokens)
        if known is not None:
            deciding = measured.overhead.median
            deciding_parts = deciding, row["overhead_ms"] / 1e3 - deciding
            second = calibrated(model.config, measured.samples, known, model.dtype.itemsize, tokens, deciding_parts)
            row |= _errors("calibrated", second, row, tokens)
    return measured


def _errors(name: str, guess: Prediction, row: dict[str, Any], tokens: int) -> dict[str, float]:
    """A prediction's times over a row's measured ones."""
    errors = {
        f"{name}_over_measured": 1e3 * guess.end_to_end(tokens) / row["end_to_end_ms"],
        f"prefill_{name}_over_measured": 1e3 * guess.prefill / row["prefill_ms"],
    }
    if tokens > 1:
        errors[f"decode_{name}_over_measured"] = 1e3 * guess.decode_per_token / row["decode_ms_per_token"]
    return errors


def row_of(
    config: Any,
    measured: Measured,
    tokens: int,
    peaks: Peaks,
    dtype: torch.dtype,
    regime: str = "resident",
) -> dict[str, Any]:
    """One efficiency row: times in milliseconds (median; ``_iqr``: distance between the quartiles), memory in bytes."""
    pair, samples, dense = measured.pair, measured.samples, measured.pair.dense[-1].samples
    sample = measured.trace
    cost = flops(config, samples)
    prefill = Spread.of([run.prefill for run in pair.method])
    # Vision, projector, decoder over the prompt, one row of lm_head per prompt.
    work = cost.vision + cost.projector + cost.prefill + cost.lm_head / max(sample.head_positions, 1)
    rate = work / prefill.median
    choices = (tokens - 1 if sample.predictor_weights else 1) if tokens > 1 else 0
    row = {
        "regime": regime,
        "output_tokens": tokens,
        "predicted": False,
        "engine": pair.method[-1].engine,
        "dense_engine": pair.dense[-1].engine,
        "repeats": len(pair.method),
        "prompt_tokens": sample.prompt_tokens,
        "batch": len(samples),
        **_milliseconds("prefill_ms", prefill),
        **_milliseconds("end_to_end_ms", Spread.of([run.end_to_end[tokens] for run in pair.method])),
        **_milliseconds("dense_end_to_end_ms", Spread.of([run.end_to_end[tokens] for run in pair.dense])),
        **_milliseconds("overhead_ms", measured.overhead + measured.choice * choices),
        "peak_memory_bytes": max(run.peak_bytes for run in pair.method),
        **_savings(config, samples, dense, tokens),
        **_ratio("tokens_per_s", Spread.of([len(samples) * tokens / run.end_to_end[tokens] for run in pair.method])),
        "prefill_tflop_per_s": rate / 1e12,
        "flops_share": rate / peaks.flops,
        **_ratio("paired_speedup", pair.speedup(tokens)),
        **_ratio("paired_prefill_speedup", pair.prefill_speedup()),
    }
    if tokens > 1:
        element = torch.finfo(dtype).bits // 8
        read = decode_bytes(config, samples, element, tokens - 1)
        dense_read = decode_bytes(config, dense, element, tokens - 1)
        decode = Spread.of([_decode(run, tokens) for run in pair.method])
        row |= {
            **_milliseconds("decode_ms_per_token", decode),
            "decode_bytes_per_token": read,
            "decode_gb_per_s": read / decode.median / 1e9,
            "bandwidth_share": read / decode.median / peaks.bandwidth,
            **_ratio("paired_decode_speedup", pair.decode_speedup(tokens)),
            "byte_limit_decode_speedup": dense_read / read,
        }
    return row


@dataclass(frozen=True)
class Predicted:
    """What the roofline model says of a method on hardware that is not at hand."""

    config: Any
    trace: SampleTrace
    """Of the whole depth, where a slice was traced."""
    rows: dict[int, dict[str, Any]]
    """By output length."""


def predicted_rows(
    config: Any,
    sample: SampleTrace,
    dense: SampleTrace,
    output_tokens: Sequence[int],
    hardware: Hardware,
    depth: int = 0,
) -> Predicted:
    """Predict rows for a model of ``depth`` layers (0: as many as were traced) from a trace.

    A device is planned with its own type, whatever the trace was made in; ``dtype`` in the row says which it is.

    Parameters
    ----------
    dense
        The dense model's trace of the same prompt; the ratios in the rows are its predicted figures over the row's own.

    Raises
    ------
    UserError
        If the hardware has too little memory.
    """
    dtype, traced = hardware.dtype, len(sample.llm_tokens)
    # Steps that a CPU computed whole before gathering are none where a kernel reads neurons in place.
    whole, sample = at_depth(config, in_dtype(config, replace(sample, masked_steps=0), dtype), depth)
    _, dense = at_depth(config, in_dtype(config, dense, dtype), depth)
    rows = {}
    for tokens in output_tokens:
        prediction, base = (predict(whole, one, hardware, dtype, tokens) for one in (sample, dense))
        rows[tokens] = {
            "device": hardware.name,
            "regime": prediction.regime,
            "output_tokens": tokens,
            "predicted": True,
            "dtype": dtype,
            "prompt_tokens": sample.prompt_tokens,
            "prefill_ms": 1e3 * prediction.prefill,
            "decode_ms_per_token": 1e3 * prediction.decode_per_token if tokens > 1 else None,
            "end_to_end_ms": 1e3 * prediction.end_to_end(tokens),
            "dense_end_to_end_ms": 1e3 * base.end_to_end(tokens),
            "tokens_per_s": tokens / prediction.end_to_end(tokens),
            "paired_speedup": base.end_to_end(tokens) / prediction.end_to_end(tokens),
            "paired_prefill_speedup": base.prefill / prediction.prefill,
            "paired_decode_speedup": base.decode_per_token / prediction.decode_per_token if tokens > 1 else None,
            **_savings(whole, [sample], [dense], tokens),
            "peak_memory_bytes": prediction.resident_bytes,
            "streamed_bytes_per_token": prediction.streamed_per_token,
            **({"from_layers": traced} if traced < len(sample.llm_tokens) else {}),
        }
    return Predicted(whole, sample, rows)


def _savings(
    config: Any, samples: Sequence[SampleTrace], dense: Sequence[SampleTrace], tokens: int
) -> dict[str, float]:
    """What answers of so many tokens cost without a clock: FLOPs and KV bytes, and dense's over them."""
    own, base = (flops(config, [one.stopped_after(tokens - 1) for one in batch]).total for batch in (samples, dense))
    rows, dense_rows = (sum(one.kv_bytes for one in batch) for batch in (samples, dense))
    return {"flops": own, "flops_ratio": base / own, "kv_bytes": rows, "kv_ratio": dense_rows / rows}


def _decode(run: Run, tokens: int) -> float:
    seconds = run.decode_per_token(tokens)
    assert seconds is not None
    return seconds


def _milliseconds(name: str, spread: Spread) -> dict[str, float]:
    return {name: 1e3 * spread.median, f"{name}_iqr": 1e3 * spread.iqr}


def _ratio(name: str, spread: Spread) -> dict[str, float]:
    return {name: spread.median, f"{name}_iqr": spread.iqr}
