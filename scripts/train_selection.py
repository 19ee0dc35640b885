"""Train the selectors of ``as_vit`` or ``focusllava`` for the bundled model, whose own weights stay as they are.

Usage: ``python scripts/train_selection.py as_vit --out FOLDER [--target 0.65] [--steps 160] [--seed 0]``. Scenes and
questions are of the mini suite's *training* split. A checkpoint in the folder is written every two minutes; the same
command goes on from it. What came out is printed and written to FOLDER: ``as_vit-TARGET.json``, ``router-TARGET.pt``.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch

from corematching import files
from corematching.errors import UserError
from corematching.models.loading import load_model
from corematching.training import as_vit, focusllava
from corematching.training.language import Packer
from corematching.training.loop import Track
from corematching.training.selection import ask, frozen
from corematching.training.vocabulary import build_tokenizer

LAYERS = (2, 3, 4)
"""Tower blocks of the bundled model before which patches leave: the second, third and fourth sixth of its depth."""


def train_as_vit(options: argparse.Namespace) -> None:
    llava, _ = load_model("tiny")
    frozen(llava)
    packer = Packer(build_tokenizer())
    name = f"as_vit-{options.target}"
    stage = as_vit.ThresholdStage(name, options.steps, llava, packer, LAYERS, options.target, options.seed)
    pixels = ask(packer, options.seed, options.steps, 8).pixels  # scenes behind those of the last step
    thresholds = as_vit.Thresholds(as_vit.first_thresholds(llava, pixels, LAYERS))
    track = Track(name, [stage], options.out, partial(print, flush=True))
    track.run(thresholds, options.stop_after)
    if name not in track.done:
        return
    tokens = as_vit.kept(llava, pixels, LAYERS, thresholds.values)
    control = as_vit.untrained_thresholds(llava, pixels, LAYERS, tokens)
    record = {
        "layers": list(LAYERS),
        "thresholds": [float(f"{value:.4g}") for value in thresholds.values],
        "tokens": round(tokens, 1),
        "control": [float(f"{value:.4g}") for value in control],
        "target": options.target,
        "seed": options.seed,
        "steps": options.steps,
        "scenes": options.steps * stage.scenes,
        "seconds": track.done[name],
    }
    files.write(options.out / f"{name}.json", json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def train_focusllava(options: argparse.Namespace) -> None:
    llava, _ = load_model("tiny")
    frozen(llava)
    name = f"focusllava-{options.target}"
    stage = focusllava.RouterStage(name, options.steps, llava, Packer(build_tokenizer()), options.target, options.seed)
    router = focusllava.Router(llava.config.vision_config.hidden_size, options.seed)
    track = Track(name, [stage], options.out, partial(print, flush=True))
    track.run(router, options.stop_after)
    if name not in track.done:
        return
    record = {"target": options.target, "seed": options.seed, "steps": options.steps}
    record |= {"scenes": options.steps * stage.scenes, "seconds": track.done[name]}
    with files.replacing(options.out / f"router-{options.target}.pt") as temporary:
        torch.save({"router": router.weights.detach(), **record}, temporary)
    print(json.dumps(record))


TRAINERS = {"as_vit": (train_as_vit, 0.65), "focusllava": (train_focusllava, 0.25)}
"""By method: what trains it, and its usual target."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=tuple(TRAINERS))
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint and the result")
    parser.add_argument(
        "--target", type=float, help="share of the dense tower's FLOPs (0.65), or of the visual tokens (0.25)"
    )
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop-after", type=int, default=None, help="end this run after so many steps")
    options = parser.parse_args(arguments)
    train, usual = TRAINERS[options.method]
    options.target = usual if options.target is None else options.target
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        train(options)
    except UserError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
