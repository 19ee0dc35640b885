"""Means over a cell's samples of what really ran, from the traces."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from corematching.answering.generator import Answer
from corematching.cost.flops import CONVENTIONS, flops
from corematching.engine.trace import SampleTrace
from corematching.models.families import family_of


class NothingHappened(RuntimeError):
    """A method that had something to reduce reduced nothing: its numbers would be the dense model's under its name."""


def summarise(answers: Sequence[Answer], model_config: Any) -> dict[str, Any]:
    """Trace section of a cell's record.

    Parameters
    ----------
    answers
        The cell's answers.
    model_config
        The model's transformers configuration, for FLOPs.

    Returns
    -------
    dict
        Token counts, KV bytes and FLOPs (2 per multiply-add), each the mean per sample; how many answers the model
        ended itself, how many hit the cap on new tokens, and that cap; KV rows that a decode step reads and holds per
        layer, and the share of dense attention on those it reads, where such were chosen or measured. FLOPs are those
        of a sample served alone: in a batch whose samples chose different neurons (``ffn_mode`` says "masked") the
        same numbers come out of more arithmetic.
    """
    traces = [answer.trace for answer in answers]
    alone = [replace(trace, ffn_mode="sliced") if trace.ffn_mode == "masked" else trace for trace in traces]
    return {
        "image_tokens": _mean([trace.image_tokens for trace in traces]),
        "tokens_entering_llm": _mean([len(trace.visual_tokens[0]) for trace in traces]),
        "visual_tokens_per_layer": _mean([trace.average_visual_tokens for trace in traces]),
        "visual_tokens_by_layer": _means([[len(layer) for layer in trace.visual_tokens] for trace in traces]),
        "neurons_by_layer": _neurons(traces),
        "ffn_width": family_of(model_config).geometry(model_config).ffn_width,
        "kv_bytes": _mean([trace.kv_bytes for trace in traces]),
        "dense_kv_bytes": _mean([trace.dense_kv_bytes for trace in traces]),
        **_rows(traces),
        "generated_tokens": _mean([answer.tokens for answer in answers]),
        "ended_answers": sum(answer.ended for answer in answers),
        "capped_answers": sum(not answer.ended for answer in answers),
        "cap": max((answer.tokens for answer in answers if not answer.ended), default=None),
        "ffn_mode": "+".join(sorted({trace.ffn_mode for trace in traces})),
        "flops": (flops(model_config, alone) / len(alone)).as_dict(),
        "flops_conventions": {
            name: _mean([count(model_config, trace) for trace in alone]) for name, count in CONVENTIONS.items()
        },
    }


def check_acted(method: Any, answers: Sequence[Answer]) -> None:
    """Refuse a cell whose method was meant to reduce something and did not, on any sample.

    Raises
    ------
    NothingHappened
        Unless the method acts on nothing (dense), its budget is everything, or some trace shows a reduction.
    """
    keep = method.parameters.get("keep")
    traces = [answer.trace for answer in answers if answer.trace.image_tokens]
    if not method.acts_on or not traces or (isinstance(keep, float) and keep == 1.0):
        return
    largest = max(trace.image_tokens for trace in traces)
    if isinstance(keep, int) and not isinstance(keep, bool) and keep >= largest:
        return
    if not any(acted(trace) for trace in traces):
        raise NothingHappened(
            f"{method.name or type(method).__name__} with {method.parameters} left all {largest} visual tokens, the KV "
            f"cache and the FFNs of all {len(traces)} samples as they were"
        )


def acted(trace: SampleTrace) -> bool:
    """Whether anything in this sample was smaller than in the dense model."""
    return (
        any(len(layer) < trace.image_tokens for layer in trace.visual_tokens)
        or any(length < trace.prompt_tokens for length in trace.kv_lengths)
        or any(chosen is not None for chosen in trace.neurons)
        or len(set(trace.vision_mlp_tokens)) > 1
        or trace.zeroed_kv > 0
        or any(
            read < trace.rows_held(layer, step)
            for layer, steps in enumerate(trace.rows_read)
            for step, read in enumerate(steps)
        )
    )


def _rows(traces: Sequence[SampleTrace]) -> dict[str, float]:
    """KV rows that a decode step reads and holds, per layer, where rows are chosen: means over all steps."""
    read: list[float] = []
    held: list[float] = []
    mass: list[float] = []
    for trace in traces:
        for layer, steps in enumerate(trace.rows_read):
            read += steps
            held += [trace.rows_held(layer, step) for step in range(len(steps))]
        mass += [share for steps in trace.mass_read for share in steps]
    found = {"rows_read": read, "rows_held": held, "mass_read": mass}
    return {name: _mean(values) for name, values in found.items() if values}


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values))


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [_mean(column) for column in zip(*rows)]


def _neurons(traces: Sequence[SampleTrace]) -> list[float | None]:
    """Per layer: mean number of FFN neurons computed in decode, None where no sample chose."""
    columns = zip(*([None if layer is None else len(layer) for layer in trace.neurons] for trace in traces))
    chosen = [[count for count in column if count is not None] for column in columns]
    return [_mean(column) if column else None for column in chosen]
