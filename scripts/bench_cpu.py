"""The efficiency targets on a small CPU machine: LLaVA-1.5-7B at real width, a few layers, random weights.

    python scripts/bench_cpu.py                      all targets (over an hour on two idle cores)
    python scripts/bench_cpu.py decode prefill       some of them
    python scripts/bench_cpu.py rows --methods refreshkv   methods that choose KV rows, over a long context
    python scripts/bench_cpu.py --layers 2 --repeats 2 --output-tokens 16   a quick look

Every target is a ratio of neighbouring runs in one process. The machine's load is printed first: cores shared with
other work stretch the waiting of threads for each other and make ratios worse, never better.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch.nn.functional import linear

from corematching import build_method, files, flops, load_model
from corematching.cost.memory import keep_freed_memory
from corematching.cost.roofline import decode_bytes
from corematching.efficiency.ffn_ways import measured_ways
from corematching.efficiency.inputs import fixed_batch, fixed_inputs
from corematching.efficiency.latency import Spread, clock, decision_seconds, in_turns
from corematching.efficiency.peaks import measure_peaks
from corematching.engine.cache import conversation_of
from corematching.engine.compiled import EagerDecoder, decoder_of, prefill
from corematching.engine.ffn import SlicedFFN
from corematching.engine.ways import Plan
from corematching.models.families import family_of

FULL_DEPTH = 32
AT_192 = {"keep": 192}
TOKEN_METHODS: dict[str, dict[str, Any]] = {
    "random": AT_192,
    "uniform": AT_192,
    "pooling": {"keep": 0.25},
    "fastv": AT_192,
    "core_tokens": {"threshold": "keep", **AT_192},
    "corematching": {"threshold": "keep", **AT_192},
    "sparsevlm": {"layers": (0, 1, 2), **AT_192},
    "pyramiddrop": {"layers": (0, 1, 2)},
    "topv": AT_192,
    "dart": AT_192,
    "tome": {},
    "tome_pre_llm": AT_192,
    "prumerge": {},
    "prumerge_plus": {},
    "visionzip": {"dominant": 162, "contextual": 30},
    "fastervlm": AT_192,
    "vtc_cls": AT_192,
    "divprune": AT_192,
}
"""All but those that need a second model; layers as far down as a four-layer slice needs."""


ROW_METHODS: dict[str, dict[str, Any]] = {
    "refreshkv": {"keep": 0.1},
    "actqkv": {"keep": 0.1},
    "attention_predictor": {"keep": 0.1},
    "pod": {"keep": 0.1},
    "snapkv": {"keep": 0.1},
    "streaming_llm": {"keep": 0.1},
    "h2o": {"keep": 0.1},
    "pyramidkv": {"keep": 0.1},
    "adakv": {"keep": 0.1},
}
"""Of a step's KV rows."""


def decode(model: Any, inputs: dict, options: argparse.Namespace) -> None:
    """One prompt, dense and sliced decode steps by turns on the same KV cache.

    Dense in three ways: as loaded; with down weights stored neuron by neuron, as while a method is installed; and with
    every neuron chosen, which reads all rows the way chosen ones are read.
    """
    with build_method("core_neurons", keep=0.4)(model) as trace, torch.inference_mode():
        cache, token = prefill(model, inputs)
        state = conversation_of(cache).state
        static = decoder_of(model, inputs, cache, token, 4 * options.output_tokens, "compiled")
        mlps = [layer.mlp for layer in family_of(model.config).decoder(model).layers]
        every = torch.arange(model.config.text_config.intermediate_size)
        ffns: dict[str, Any] = {
            "as loaded": {i: _as_loaded(mlp) for i, mlp in enumerate(mlps)},
            "stored neuron by neuron": {},
            "read like chosen neurons": {i: _every(mlp, every, state.ffn[i]) for i, mlp in enumerate(mlps)},
            "sliced": state.ffn,
        }
        times: dict[str, list[float]] = {name: [] for name in ffns}
        for _ in range(options.output_tokens):
            for name, state.ffn in ffns.items():
                start = clock(model.device)
                static.step()
                times[name].append(clock(model.device) - start)
        (sample,) = trace.drain()  # the last step was a sliced one
    sliced = times.pop("sliced")
    read, whole = (
        decode_bytes(model.config, own, model.dtype.itemsize, 4 * options.output_tokens)
        for own in (sample, replace(sample, neurons=[None] * len(sample.neurons)))
    )
    for name, dense in times.items():
        ratios = Spread.of([one / other for one, other in zip(dense, sliced, strict=True)])
        report(f"decode, core_neurons keep 0.4, dense {name}", ratios, whole / read, "bytes", 0.92)
    print(f"    sliced step {1e3 * median(sliced):.1f} ms, {read / median(sliced) / 1e9:.1f} GB/s of weights and KV")


def _every(mlp: Any, every: torch.Tensor, sliced: SlicedFFN) -> SlicedFFN:
    """All neurons, the way chosen ones are read (in place: nothing is gathered)."""
    return SlicedFFN(mlp, every, plan=Plan(sliced.plan.before))


def _as_loaded(mlp: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    down = mlp.down_proj.weight.contiguous()
    return lambda x: linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), down)


def prefills(model: Any, inputs: dict, options: argparse.Namespace) -> None:
    """FastV and core tokens at keep 64, layer 2: speed-up over the FLOPs ratio; and what deciding costs."""
    for name, parameters in (("fastv", {}), ("core_tokens", {"threshold": "keep"})):
        method = build_method(name, keep=64, layer=2, **parameters)
        pair = in_turns(model, build_method("dense"), method, inputs, [1], options.repeats, "eager")
        limit = flops(model.config, pair.dense[0].trace).total / flops(model.config, pair.method[0].trace).total
        report(f"prefill, {name} keep 64", pair.prefill_speedup(), limit, "FLOPs", 0.90)
        overhead(model, inputs, method, median(run.prefill for run in pair.dense))
    method = build_method("corematching", threshold="keep", keep=64)
    overhead(model, inputs, method, median(run.prefill for run in pair.dense))


def overhead(model: Any, inputs: dict, method: Any, dense_prefill: float) -> None:
    """Decisions of a method over the dense prefill, both extrapolated to the full depth (labelled so)."""
    runs = decision_seconds(model, method, inputs, 2)
    decisions = [median(column) for column in zip(*(run.prefill + run.decoding for run in runs), strict=True)]
    depth = model.config.text_config.num_hidden_layers
    more = FULL_DEPTH - depth
    with torch.inference_mode():
        start = clock(model.device)
        model.model.get_image_features(inputs["pixel_values"])
        vision = clock(model.device) - start
    full = vision + (dense_prefill - vision) * FULL_DEPTH / depth
    repeated = decisions[-1] * more if "neurons" in method.acts_on else 0.0
    spent = sum(decisions) + repeated
    print(
        f"  overhead, {method.name}: {1e3 * sum(decisions):.0f} ms here, {1e3 * spent:.0f} ms at {FULL_DEPTH} layers "
        f"= {100 * spent / full:.2f} % of the dense prefill there (extrapolated from {depth} layers; target <= 1 %)"
    )


def total(model: Any, inputs: dict, options: argparse.Namespace) -> None:
    """CoreMatching, prefill and answer, against what FLOPs (prefill) and bytes (decode) allow; choosing included."""
    tokens = options.output_tokens
    method = build_method("corematching", threshold="keep", keep=64)
    pair = in_turns(model, build_method("dense"), method, inputs, [1, tokens], options.repeats, "compiled")
    dense, ours = pair.dense[0].trace, pair.method[0].trace
    work = flops(model.config, dense), flops(model.config, ours)
    per_prefill = [cost.vision + cost.projector + cost.prefill for cost in work]
    element = model.dtype.itemsize
    read = [decode_bytes(model.config, sample, element, tokens - 1) for sample in (dense, ours)]
    answers = [run.end_to_end[tokens] for run in pair.dense]
    least = [
        run.prefill * per_prefill[1] / per_prefill[0] + (run.end_to_end[tokens] - run.prefill) * read[1] / read[0]
        for run in pair.dense
    ]
    limit = Spread.of([whole / low for whole, low in zip(answers, least, strict=True)]).median
    report(f"corematching keep 64, prefill + {tokens} tokens", pair.speedup(tokens), limit, "FLOPs and bytes", 0.90)


def short(model: Any, inputs: dict, options: argparse.Namespace) -> None:
    """Short answers with chosen neurons: what the choice costs before it repays itself."""
    lengths = [1, 2, 4, 8, 16]
    for name, parameters in (("core_neurons", {"keep": 0.4}), ("corematching", {"threshold": "keep", "keep": 64})):
        method = build_method(name, **parameters)
        pair = in_turns(model, build_method("dense"), method, inputs, lengths, options.repeats, "compiled")
        times = ", ".join(f"{pair.speedup(length).median:.3f} at {length}" for length in lengths)
        print(f"  {name}, times dense by answer tokens: {times} (target >= 1 everywhere)", flush=True)


def batch(model: Any, inputs: dict, options: argparse.Namespace) -> None:
    """Batches of prompts that chose different neurons: time to first token, tokens per second, against dense.

    Where a batch's neurons are computed over their union, that is by measurement, as for one prompt.
    """
    methods = {
        "dense": build_method("dense"),
        "core_neurons keep 0.4": build_method("core_neurons", keep=0.4),
        "corematching keep 64": build_method("corematching", threshold="keep", keep=64),
    }
    for size in options.batch:
        together = fixed_batch(model, size)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
        for turn in range(max(1, options.repeats // 3) + 1):
            for name, method in methods.items():
                with method(model), torch.inference_mode():
                    times = _batch_times(model, together, steps=16)
                if turn:  # the first warms up
                    found[name].append(times)
        base = tuple(median(column) for column in zip(*found["dense"], strict=True))
        for name, times in found.items():
            first, step = (median(column) for column in zip(*times, strict=True))
            print(
                f"  batch {size}, {name}: first token {1e3 * first:.0f} ms ({base[0] / first:.2f} x dense), then "
                f"{size / step:.1f} tokens/s ({base[1] / step:.2f} x dense; target >= 1)",
                flush=True,
            )


def _batch_times(model: Any, inputs: dict, steps: int) -> tuple[float, float]:
    """Seconds to the first token, and per decode step, the choice of neurons included."""
    start = clock(model.device)
    cache, token = prefill(model, inputs)
    first = clock(model.device)
    decoder = decoder_of(model, inputs, cache, token, steps, "compiled")
    for _ in range(steps):
        decoder.step()
    return first - start, (clock(model.device) - first) / steps


def engine(model: Any, inputs: dict, options: argparse.Namespace) -> None:
    """What the engine costs: stock transformers and `dense` attached, eagerly, by turns."""
    steps, ratios = 8, []
    for repeat in range(options.repeats + 1):
        times = {}
        for name in ("stock", "dense") if repeat % 2 else ("dense", "stock"):
            if name == "stock":
                times[name] = _eager(model, inputs, steps)
            else:
                with build_method("dense")(model):
                    times[name] = _eager(model, inputs, steps)
        ratios.append(times["dense"] / times["stock"])
    spread = Spread.of(ratios[1:])
    print(f"  engine, dense attached over stock: {spread.median:.4f} (IQR {spread.iqr:.4f}; target <= 1.02)")


def _eager(model: Any, inputs: dict, steps: int) -> float:
    with torch.inference_mode():
        start = clock(model.device)
        cache, token = prefill(model, inputs)
        decoder = EagerDecoder(model, inputs, cache, token)
        for _ in range(steps):
            decoder.step()
        return clock(model.device) - start


def tokens(model: Any, inputs: dict, options: argparse.Namespace) -> None:
    """Every token method, leaving about 192 visual tokens, one token and eight: never slower than dense."""
    for name, parameters in TOKEN_METHODS.items():
        method = build_method(name, **parameters)
        pair = in_turns(model, build_method("dense"), method, inputs, [1, 8], max(1, options.repeats // 2), "compiled")
        left = len(pair.method[0].trace.visual_tokens[-1])
        one, eight = pair.speedup(1), pair.speedup(8)
        times = f"{one.median:.2f} x dense at 1 token, {eight.median:.2f} at 8"
        print(f"  {name}, {left} left: {times} ({len(pair.method)} pairs)", flush=True)


def rows(model: Any, inputs: dict, options: argparse.Namespace) -> None:
    """Methods that choose KV rows for every step, at 10 % of a long context: ms per token against dense and the limit.

    Dense steps write into static buffers. The limit is dense bytes over those a step of the method must read, weights
    included, each chosen row once (the engine copies them together first), and what choosing reads.
    """
    image = family_of(model.config).geometry(model.config).image_tokens
    prompt = fixed_inputs(model, before=35, after=options.context - image - 35)
    element, steps = model.dtype.itemsize, options.output_tokens
    dense, sample = _timed_steps(model, build_method("dense"), prompt, steps)
    whole = median(dense)
    print(f"  dense, {options.context} rows: {1e3 * whole:.1f} ms per token")
    read = decode_bytes(model.config, sample, element, steps)
    for name in options.methods or ROW_METHODS:
        method = build_method(name, **ROW_METHODS[name])
        times, sample = _timed_steps(model, method, prompt, steps)
        own = [decode_bytes(model.config, _one_step(sample, step), element, 1) for step in range(steps)]
        rows = [sum(_rows_of(sample, step)) for step in range(steps)]
        share = sum(rows) / sum(len(sample.kv_lengths) * (options.context + step + 1) for step in range(steps))
        print(
            f"  {name}, {100 * share:.1f} % of the rows: {1e3 * median(times):.1f} ms per token, "
            f"mean {1e3 * sum(times) / steps:.1f}"
        )
        _against_limit("all steps", whole / (sum(times) / steps), read / (sum(own) / steps))
        least = min(own)
        partial = [seconds for seconds, size in zip(times, own, strict=True) if size < 1.01 * least]
        if len(partial) < steps:
            _against_limit(f"{len(partial)} partial steps", whole / median(partial), read / least)


def _timed_steps(model: Any, method: Any, prompt: dict, steps: int) -> tuple[list[float], Any]:
    with method(model) as trace, torch.inference_mode():
        engine = "eager" if model._corematching.chooses_rows else "compiled"
        cache, token = prefill(model, prompt)
        decoder = decoder_of(model, prompt, cache, token, steps, engine)
        times = []
        for _ in range(steps):
            start = clock(model.device)
            decoder.step()
            times.append(clock(model.device) - start)
        return times, trace.drain()[0]


def _rows_of(sample: Any, step: int) -> list[float]:
    """KV rows read in a step, by layer."""
    if sample.rows_read:
        return [read[step] for read in sample.rows_read]
    return [sample.rows_held(layer, step) for layer in range(len(sample.kv_lengths))]


def _one_step(sample: Any, step: int) -> Any:
    rows_read = [read[step : step + 1] for read in sample.rows_read]
    return replace(sample, rows_read=rows_read, choice_bytes=sample.choice_bytes[step : step + 1])


def _against_limit(what: str, speedup: float, limit: float) -> None:
    print(f"    {what}: {speedup:.3f} x dense, bytes allow {limit:.3f}: {100 * speedup / limit:.1f} %", flush=True)


def report(what: str, speedup: Spread, limit: float, kind: str, target: float) -> None:
    print(
        f"  {what}: {speedup.median:.3f} x dense (IQR {speedup.iqr:.3f}), {kind} allow {limit:.3f}: "
        f"{100 * speedup.median / limit:.1f} % (target >= {100 * target:.0f} %)",
        flush=True,
    )


PARTS = {
    "decode": decode,
    "prefill": prefills,
    "total": total,
    "short": short,
    "batch": batch,
    "engine": engine,
    "tokens": tokens,
}
ON_REQUEST = {"rows": rows}
"""Parts that are measured when named only."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", help=f"what to measure: {', '.join(PARTS)} (default: these), {', '.join(ON_REQUEST)}"
    )
    parser.add_argument("--model", default="llava_1_5_7b")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers, at full width")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8], help="batch sizes of part batch")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--context", type=int, default=4096, help="of part rows: KV rows of the prompt")
    parser.add_argument("--methods", nargs="+", default=[], metavar="NAME", help="of part rows: these methods only")
    options = parser.parse_args()
    for part in options.parts:
        if part not in PARTS | ON_REQUEST:
            parser.error(f"unknown part {part!r}: choose from {', '.join(PARTS | ON_REQUEST)}")
    for name in options.methods:
        if name not in ROW_METHODS:
            parser.error(f"unknown method {name!r}: choose from {', '.join(ROW_METHODS)}")
    keep_freed_memory()
    machine = (
        f"{files.cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{machine}, {options.dtype}, load {os.getloadavg()[0]:.1f}", flush=True)
    model, _ = load_model(options.model, weights="random", num_layers=options.layers, dtype=options.dtype, device="cpu")
    peaks = measure_peaks(model.device, model.dtype)
    print(f"peaks: read {peaks.read_bandwidth / 1e9:.1f} GB/s, matrix product {peaks.flops / 1e9:.0f} GFLOP/s")
    print(
        f"core neurons, keep 0.4: {measured_ways(family_of(model.config).decoder(model).layers[0].mlp, 0.4)}",
        flush=True,
    )
    inputs = fixed_inputs(model)
    for part in options.parts or PARTS:
        print(f"{part} (load {os.getloadavg()[0]:.1f})", flush=True)
        (PARTS | ON_REQUEST)[part](model, inputs, options)


if __name__ == "__main__":
    main()
