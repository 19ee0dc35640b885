"""Command line of ``scripts/train_tiny.py``."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from corematching.training.architecture import TinyShape, build_model
from corematching.training.codes import CodeBook
from corematching.training.language import Packer
from corematching.training.loop import Track
from corematching.training.recipe import SHALLOW_LAYERS, shallow_stages, vision_stages
from corematching.training.vocabulary import build_tokenizer


def main(argv: list[str] | None = None) -> None:
    """Train; see the parser's help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and of the final model")
    parser.add_argument("--track", choices=("vision", "shallow"), required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer()
    shape = TinyShape() if args.track == "vision" else TinyShape(layers=SHALLOW_LAYERS)
    codes = CodeBook(tokenizer, shape.width)
    model = build_model(tokenizer, codes, shape, args.seed)
    log = partial(print, flush=True)
    stages = vision_stages(codes) if args.track == "vision" else shallow_stages(codes, Packer(tokenizer))
    Track(args.track, stages, args.out, log).run(model)


if __name__ == "__main__":
    main()
