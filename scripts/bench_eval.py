"""Throughput of evaluation: lmms-eval's own LLaVA wrapper, this package one by one, and this package as it runs sweeps.

    python scripts/bench_eval.py                             dense, sweep, one question per image, growth (some minutes)
    python scripts/bench_eval.py dense sweep --images 2      some of them, smaller
    python scripts/bench_eval.py growth --json FILE

Every part runs the same questions with the same model in one process, through lmms-eval, scoring included:

- *stock*: lmms-eval's ``llava_hf``, batch size 1 (it has no other);
- *alone*: this package with one question per forward pass and one cell at a time;
- *full*: batches whose questions share their image and prompt beginning; cells of a sweep answered together.

The arithmetic limits are the FLOPs of stock, and of all answers as if alone, over those that cannot be shared
(:func:`corematching.cost.shared.least_flops`): no sharing can be faster at the same FLOP/s. Batches reach more FLOP/s
than single questions, so a share may exceed 100 %.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module

import corematching as cm
from corematching import files
from corematching.answering.encoding import Encoder
from corematching.answering.generator import Generator
from corematching.answering.prompts import Prompts, Question
from corematching.benchmarks import load_benchmark, load_source
from corematching.benchmarks.tasks import build_tasks
from corematching.cli import settle
from corematching.cost.flops import flops
from corematching.cost.memory import keep_freed_memory, peak_memory
from corematching.cost.shared import least_flops
from corematching.engine.sharing import Sharing
from corematching.evaluation import provenance
from corematching.evaluation.experiment import method_rows
from corematching.evaluation.harness import evaluate
from corematching.evaluation.lmms_model import CoreMatchingLMM
from corematching.evaluation.settings import read_settings
from corematching.evaluation.sheet import Sheet
from corematching.models.families import family_of
from corematching.models.loading import model_path
from corematching.registry import build_method

BENCHMARK = "gqa"
PARTS = ("dense", "sweep", "single", "growth")


def main(argv: list[str] | None = None) -> int:
    """Measure the parts asked for and print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--model", default="tiny", help="a conf/model name or a local path (default tiny)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default float32)")
    parser.add_argument("--images", type=int, default=3, help="images asked about (default 3)")
    parser.add_argument("--per-image", type=int, default=20, help="questions about each (default 20)")
    parser.add_argument("--cells", type=int, default=16, help="of experiment gqa_sweep, evenly spaced (default 16)")
    parser.add_argument("--batch-size", type=int, default=32, help="most questions per forward pass (default 32)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"no part {part!r}: choose from {', '.join(PARTS)}")
    print(f"{provenance.hardware()['cpu']}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    bench = Bench(args)
    results = {part: getattr(bench, part)() for part in args.parts or PARTS}
    if args.json:
        files.write(args.json, json.dumps({"hardware": provenance.hardware(), **results}, indent=1) + "\n")
    return 0


@dataclass
class Run:
    """What answering took."""

    name: str
    seconds: float
    """lmms-eval and scoring included."""
    peak: int
    """Highest resident set (on a GPU: allocated memory), bytes."""
    texts: list[list[str]]
    """Answers by method."""
    traces: list[list[Any]]
    """By method; none of the stock wrapper."""


class Bench:
    """The model, the questions, and the ways of answering them."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.model, self.processor = cm.load_model(args.model, dtype=args.dtype)
        keep_freed_memory()  # for all ways of answering
        self.dense_only = [cm.build_method("dense")]
        self.methods = sweep_methods(args.model, args.cells)
        warm = self.tasks(1, 4)
        for size in (1, args.batch_size):
            self.ours("warm-up", warm, self.dense_only, size)

    def tasks(self, images: int, per_image: int) -> Any:
        """lmms-eval's tasks with questions about so many images."""
        n = max(2, images * per_image)
        return build_tasks(load_benchmark(BENCHMARK), load_source("mini", n=n, per_image=per_image), "llava15", n)

    # ------------------------------------------------------------------------------------------------------------ parts
    def dense(self) -> list[dict[str, Any]]:
        """One cell, many questions per image."""
        return self.compared("dense", self.tasks(self.args.images, self.args.per_image), self.dense_only)

    def single(self) -> list[dict[str, Any]]:
        """One cell, one question per image."""
        return self.compared("dense, 1 per image", self.tasks(self.args.images * 8, 1), self.dense_only)

    def sweep(self) -> list[dict[str, Any]]:
        """Many cells. Stock knows no methods: it is the dense run, as often as there are cells, measured once."""
        tasks = self.tasks(self.args.images, self.args.per_image)
        return self.compared(f"{len(self.methods)} cells", tasks, self.methods)

    def growth(self) -> list[dict[str, Any]]:
        """How time grows with questions and with cells."""
        runs = []
        for times in (1, 2, 4):
            tasks = self.tasks(times * self.args.images, self.args.per_image)
            runs.append(self.ours(f"dense, {times}x questions", tasks, self.dense_only, self.args.batch_size))
        tasks = self.tasks(self.args.images, self.args.per_image)
        for step in (4, 2, 1):
            methods = self.methods[::step]
            runs.append(self.ours(f"{len(methods)} cells", tasks, methods, self.args.batch_size))
        return [told(run) for run in runs]

    def compared(self, name: str, tasks: Any, methods: Sequence[Any]) -> list[dict[str, Any]]:
        """Stock, alone and full, with speed-ups and how close they come to the arithmetic limit."""
        full = self.ours(f"{name}, full", tasks, methods, self.args.batch_size)
        alone = self.ours(f"{name}, alone", tasks, methods, 1)
        stock = self.stock(f"{name}, stock", tasks)
        stock.seconds *= len(methods)
        limits = self.limits(tasks, full)
        rows = [told(stock)]
        for run in (alone, full):
            more = {"differs_from_alone": differing(run.texts, alone.texts)}
            more["differs_from_stock"] = differing(run.texts[:1], stock.texts)
            more["times_stock"] = stock.seconds / run.seconds
            if run is full:
                more |= {"limit_stock": limits[0], "times_alone": alone.seconds / run.seconds, "limit_alone": limits[1]}
                more["share_of_limit"] = more["times_alone"] / limits[1]
            rows.append(told(run, **more))
        return rows

    # ------------------------------------------------------------------------------------------------------------- runs
    def ours(self, name: str, tasks: Any, methods: Sequence[Any], batch_size: int) -> Run:
        """All methods, together if questions run in batches, else one after the other."""
        generator = Generator(self.model, self.processor, batch_size=batch_size)
        sheet = Sheet(generator, methods)
        texts, traces = [], []
        started = time.perf_counter()
        with peak_memory(self.model.device) as peak:
            for number, method in enumerate(methods):
                ask = sheet.column(number) if batch_size > 1 else None
                model = CoreMatchingLMM.wrap(generator, method, self.args.model, ask)
                evaluate(model, tasks)
                texts.append([answer.text for answer in model.answers.values()])
                traces.append([answer.trace for answer in model.answers.values()])
        return Run(name, time.perf_counter() - started, peak.bytes, texts, traces)

    def stock(self, name: str, tasks: Any) -> Run:
        """lmms-eval's own wrapper, dense."""
        model = stock_wrapper(self.args.model, self.args.dtype, self.model.device)
        started = time.perf_counter()
        with peak_memory(self.model.device) as peak:
            samples = evaluate(model, tasks)["samples"]
        seconds = time.perf_counter() - started
        texts = [row["filtered_resps"][0].strip() for rows in samples.values() for row in rows]
        return Run(name, seconds, peak.bytes, [texts], [])

    def limits(self, tasks: Any, run: Run) -> tuple[float, float]:
        """FLOPs of stock, and of every answer as if alone, over FLOPs that cannot be shared. Dense comes first."""
        config = self.model.config
        least = least_flops(config, run.traces, *self.beginnings(tasks))
        alone = [flops(config, traces).total for traces in run.traces]
        return len(alone) * alone[0] / least, sum(alone) / least

    def beginnings(self, tasks: Any) -> tuple[list[int], list[int]]:
        """Per question: its group of prompts that begin alike, and its own tokens."""
        asked = [
            Question(task.doc_to_text(doc), lambda task=task, doc=doc: task.doc_to_visual(doc))
            for task in tasks
            for doc in task.eval_docs
        ]
        prompts = Prompts(asked, Encoder(self.model.config, self.processor), "llava15", "pad")
        (batch,) = prompts.batches(lambda: len(asked), sys.maxsize)
        image_token = family_of(self.model.config).image_token_id(self.model.config)
        sharing = Sharing.of(batch.input_ids, batch.attention_mask, batch.images, image_token)
        order = sorted(range(len(asked)), key=batch.indices.__getitem__)
        return [sharing.groups[row] for row in order], [sharing.ends[row] for row in order]


def sweep_methods(model: str, count: int) -> list[Any]:
    """Methods of experiment ``gqa_sweep``, dense first, then evenly spaced over its lines."""
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", ["experiment=gqa_sweep", f"model={model}", "data=mini"])
    rows = method_rows(read_settings(settle(config, {}, [])))
    chosen = [rows[number * len(rows) // count] for number in range(min(count, len(rows)))]
    return [build_method(row.method, **row.parameters) for row in chosen]


def stock_wrapper(model: str, dtype: str, device: torch.device) -> Any:
    """lmms-eval's simple ``llava_hf``; it imports decord for videos, which is not needed here."""
    if "decord" not in sys.modules:
        decord: Any = types.ModuleType("decord")
        decord.VideoReader = decord.cpu = None
        sys.modules["decord"] = decord
    from lmms_eval.models.simple.llava_hf import VICUNA_CHAT_TEMPLATE, LlavaHf

    place = str(device)
    return LlavaHf(
        pretrained=model_path(model), device=place, device_map=place, dtype=dtype, chat_template=VICUNA_CHAT_TEMPLATE
    )


def differing(texts: Sequence[Sequence[str]], others: Sequence[Sequence[str]]) -> float:
    """Share of answers that are not the same."""
    pairs = [pair for own, other in zip(texts, others, strict=True) for pair in zip(own, other, strict=True)]
    return sum(one != two for one, two in pairs) / len(pairs)


def told(run: Run, **more: float) -> dict[str, Any]:
    """Print a run's line; returns it as a dictionary."""
    row = {"name": run.name, "questions": len(run.texts[0]), "seconds": run.seconds, "peak_gb": run.peak / 1e9, **more}
    words = {
        "times_stock": "{:.1f}x stock",
        "limit_stock": "arithmetic limit {:.1f}x",
        "times_alone": "{:.1f}x alone",
        "limit_alone": "arithmetic limit {:.1f}x",
        "share_of_limit": "{:.0%} of it",
        "differs_from_alone": "{:.1%} of answers differ from alone",
        "differs_from_stock": "{:.1%} from stock",
    }
    notes = [words[name].format(value) for name, value in more.items()]
    line = [f"{run.name:24} {row['questions']:5} questions {run.seconds:7.1f} s   peak {row['peak_gb']:.2f} GB", *notes]
    print(", ".join(line), flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
