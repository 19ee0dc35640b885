"""Train the neuron predictors of ``dejavu`` and ``powerinfer`` for a model, and report their recall per layer.

Usage: ``python scripts/train_predictors.py [--model tiny] [--prompts 60] [--keep 0.4] [--rank 64] [--labels largest]
[--relu] [--output FILE]``. The form is Deja Vu's unless said otherwise: two linear maps. Its labels, activations above
0, belong to ReLU FFNs: they are ``--labels positive``.
Calibration prompts are scenes and questions of the mini suite's *training* split. The file goes beside the model's
weights, where the methods look for it, unless ``--output`` says otherwise (then pass it as ``predictor=FILE``).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from corematching.benchmarks.mini.questions import questions_for
from corematching.benchmarks.mini.scenes import make_scene
from corematching.engine.predictors import FILE_NAME, save_predictors
from corematching.errors import UserError
from corematching.models.loading import model_path
from corematching.training.calibration import inputs_about, load_with_processor
from corematching.training.predictors import LABELS, collect, train_predictor
from corematching.training.prompts import user_prompt

SHORT_ANSWERS = ("vqav2", "gqa", "pope", "textvqa")
FIRST_SCENE = 900_000
"""Seed of the first calibration scene."""


def prompts(processor, count: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Model inputs of ``count`` training questions, going through the short-answer benchmarks in turn."""
    rng = random.Random(0)
    made, seed = 0, FIRST_SCENE
    while made < count:
        scene, benchmark = make_scene(seed, "train"), SHORT_ANSWERS[seed % len(SHORT_ANSWERS)]
        for question in questions_for(benchmark, scene, rng)[: min(3, count - made)]:
            yield inputs_about(processor, scene, user_prompt(benchmark, question, "llava15")).to(device)
            made += 1
        seed += 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="a conf/model name, local path or hub id")
    parser.add_argument("--prompts", type=int, default=60, help="calibration prompts")
    parser.add_argument("--keep", type=float, default=0.4, help="share of neurons that recall is measured at")
    parser.add_argument("--rank", type=int, default=64, help="hidden width of a predictor")
    parser.add_argument("--steps", type=int, default=400, help="training steps per layer")
    parser.add_argument("--labels", choices=LABELS, default="largest", help="which activations to predict")
    parser.add_argument("--relu", action="store_true", help="put a ReLU between the two maps, as PowerInfer does")
    parser.add_argument("--output", type=Path, default=None, help="file to write")
    options = parser.parse_args(arguments)
    try:
        model, processor = load_with_processor(options.model)
    except UserError as error:
        parser.error(str(error))
    output = options.output or Path(model_path(options.model)) / FILE_NAME
    if not output.parent.is_dir():
        parser.error(f"{options.model} is not a local folder: say where to write with --output")
    samples = collect(model, prompts(processor, options.prompts, model.device))
    predictors, recalls = {}, []
    for layer, own in samples.items():
        predictors[layer], found = train_predictor(
            own, options.keep, options.rank, options.steps, labels=options.labels, relu=options.relu
        )
        recalls.append(round(found, 4))
        print(f"layer {layer:2d}: recall {found:.3f} on held-out tokens (chance {options.keep:.3f})")
    notes = {"model": options.model, "keep": str(options.keep), "prompts": str(options.prompts)}
    notes["labels"] = options.labels
    save_predictors(output, predictors, {**notes, "recall": json.dumps(recalls)})
    print(f"mean recall {sum(recalls) / len(recalls):.3f}; wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
