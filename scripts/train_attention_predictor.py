"""Train the net of ``attention_predictor`` on a model's dense attention, and say what that gains over an untrained net.

Usage: ``python scripts/train_attention_predictor.py [--model tiny] [--prompts 24] [--held-out 12] [--output FILE]``.
Prompts ask for every object in scenes of the mini suite's *training* split; answers go on to ``--tokens``. The gate:
on scenes kept aside, the trained net finds more of the next token's best blocks than the untrained one does, by more
than twice the standard error over the scenes. Exit status 1 if it is missed. The mean of the history, which needs no
net, is printed beside them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

import torch

from corematching import files
from corematching.benchmarks.mini.scenes import make_scene
from corematching.errors import UserError
from corematching.methods.attention_predictor import BUNDLED
from corematching.training.attention_predictor import collect, recall, train, untrained
from corematching.training.calibration import inputs_about, load_with_processor

FIRST_SCENE = 950_000
"""Seed of the first scene."""
QUESTION = "Describe all objects in the image, each with its size, its pattern, its color and what it is."
SHARE = 0.25
"""Share of the blocks that recall is measured at."""


def prompts(processor, first: int, count: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Model inputs of ``count`` scenes from ``first`` on."""
    for number in range(first, first + count):
        yield inputs_about(processor, make_scene(FIRST_SCENE + number, "train"), QUESTION).to(device)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="a conf/model name, local path or hub id")
    parser.add_argument("--prompts", type=int, default=24, help="scenes to train on")
    parser.add_argument("--held-out", type=int, default=12, help="scenes to measure on")
    parser.add_argument("--tokens", type=int, default=48, help="decoded tokens per scene")
    parser.add_argument("--steps", type=int, default=800, help="training steps of 32 windows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=BUNDLED, help="file to write (default: the bundled one)")
    options = parser.parse_args(arguments)
    try:
        model, processor = load_with_processor(options.model)
    except UserError as error:
        parser.error(str(error))
    start = time.perf_counter()
    total = options.prompts + options.held_out
    traces = collect(model, prompts(processor, 0, total, model.device), options.tokens)
    learned, aside = traces[: options.prompts], traces[options.prompts :]
    weights = train(learned, options.steps, seed=options.seed)
    seconds = time.perf_counter() - start
    nets = {"trained": weights, "untrained": untrained(options.seed), "mean of history": None}
    found = {name: [recall(net, trace, SHARE) for trace in aside] for name, net in nets.items()}
    for name, values in found.items():
        print(f"{name:16s} recall of the best {SHARE:.0%} of blocks {mean(values):.3f}")
    met = False
    for name in ("untrained", "mean of history"):
        gains = [own - other for own, other in zip(found["trained"], found[name], strict=True)]
        error = stdev(gains) / len(gains) ** 0.5
        print(f"trained over {name}: {mean(gains):+.3f} (standard error {error:.3f}, {len(gains)} scenes)")
        met = met or (name == "untrained" and mean(gains) > 2 * error)
    notes = {
        "model": options.model,
        "prompts": options.prompts,
        "tokens": options.tokens,
        "steps": options.steps,
        "seed": options.seed,
        "seconds": round(seconds, 1),
        "recall": {name: round(mean(values), 4) for name, values in found.items()},
    }
    with files.replacing(options.output) as temporary:
        torch.save({"weights": {name: weight.half() for name, weight in weights.items()}, "notes": notes}, temporary)
    print(f"{seconds:.0f} s; gate {'met' if met else 'MISSED'}; wrote {options.output}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
