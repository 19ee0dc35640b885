"""Train the bundled tiny LLaVA from nothing.

Three tracks: "vision" (image tower and projector), "shallow" (language model at half depth, on oracle tokens; can run
beside the vision track) and "deep" (full depth, then real images; needs the other two). Each keeps a checkpoint in
the output folder, written every two minutes, and continues from it exactly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from corematching import files
from corematching.errors import UserError
from corematching.training.architecture import TinyShape, build_model, deepen
from corematching.training.card import model_card
from corematching.training.codes import CodeBook
from corematching.training.evaluate import report
from corematching.training.export import export
from corematching.training.language import Packer
from corematching.training.loop import Stage, Track
from corematching.training.recipe import SHALLOW_LAYERS, deep_stages, shallow_stages, vision_stages
from corematching.training.vocabulary import build_tokenizer

TRACKS = ("vision", "shallow", "deep")


def main(argv: list[str] | None = None) -> None:
    """Train the chosen tracks; after the deep one save the model and report its accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and of the model, tiny_llava")
    parser.add_argument("--tracks", nargs="+", choices=TRACKS, default=TRACKS, help="what to train (default: all)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in the folder")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1; run two tracks side by side)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        for name in TRACKS:
            if name in args.tracks:
                train(name, args.out, args.resume, args.seed, args.device)
    except UserError as error:
        print(f"train_tiny: {error}", file=sys.stderr)
        sys.exit(2)


def train(name: str, out: Path, resume: bool, seed: int, device: str) -> None:
    """Run one track.

    Raises
    ------
    UserError
        If a checkpoint is in the way, or one that the deep track builds on is missing.
    """
    if (out / f"{name}.pt").exists() and not resume:
        raise UserError(f"{out / f'{name}.pt'} exists: give --resume to go on from it, or another --out")
    tokenizer = build_tokenizer()
    shape = TinyShape() if name != "shallow" else TinyShape(layers=SHALLOW_LAYERS)
    codes = CodeBook(tokenizer, shape.width)
    packer = Packer(tokenizer)
    model: nn.Module = build_model(tokenizer, codes, shape, seed)
    if name == "deep":
        _join(model, build_model(tokenizer, codes, TinyShape(layers=SHALLOW_LAYERS), seed), out)
    model.to(device)
    codes.to(device)
    stages: Sequence[Stage]
    if name == "vision":
        stages = vision_stages(codes)
    else:
        stages = (shallow_stages if name == "shallow" else deep_stages)(codes, packer)
    Track(name, stages, out, partial(print, flush=True)).run(model)
    if name == "deep":
        finish(model.cpu(), tokenizer, out)


def finish(model, tokenizer, out: Path) -> None:
    """Save the trained model with its card in ``out/tiny_llava``."""
    folder = out / "tiny_llava"
    export(model, tokenizer, folder)
    seconds: dict[str, float] = {}
    for name in TRACKS:
        done = torch.load(out / f"{name}.pt", weights_only=True)["done"]
        seconds |= {f"{name}: {stage}": value for stage, value in done.items()}
    parameters = sum(weight.numel() for weight in model.parameters())
    card = model_card(model.config, parameters, seconds, torch.get_num_threads(), report(folder))
    files.write(folder / "README.md", card)
    print(card)


def _join(model, shallow, out: Path) -> None:
    """Start the deep model from the finished tracks: the shallow language model, the trained tower and projector."""
    for name, stage in (("vision", "digits"), ("shallow", "settle")):
        if not (out / f"{name}.pt").exists() or stage not in torch.load(out / f"{name}.pt", weights_only=True)["done"]:
            raise UserError(f"the deep track needs the finished {name} track in {out}")
    shallow.load_state_dict(torch.load(out / "shallow.pt", weights_only=True)["model"])
    deepen(shallow, model)
    vision = torch.load(out / "vision.pt", weights_only=True)["model"]
    seen = {name: value for name, value in vision.items() if "vision_tower" in name or "multi_modal_projector" in name}
    model.load_state_dict(seen, strict=False)


if __name__ == "__main__":
    main()
