"""Train the bundled tiny LLaVA, from nothing or from an earlier tiny model (--start).

Six tracks. From nothing: "vision" (image tower and projector), "shallow" (language model at half depth, on oracle
tokens) and "deep" (both joined at full depth). Then, from there or from --start: "sight" (the tower on varied scenes),
"reading" (the language model learns in which layers to read, on oracle tokens) and "whole" (real images). Tracks that
stand in front of a join can run side by side. Each keeps a checkpoint in the output folder, written every two minutes,
and continues from it exactly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from corematching import files
from corematching.errors import UserError
from corematching.training import recipe
from corematching.training.architecture import TinyShape, build_model, deepen
from corematching.training.card import model_card
from corematching.training.codes import CodeBook
from corematching.training.evaluate import report
from corematching.training.export import export
from corematching.training.language import Packer
from corematching.training.loop import Stage, Track
from corematching.training.vocabulary import build_tokenizer

FROM_NOTHING = ("vision", "shallow", "deep")
VARIED = ("sight", "reading", "whole")
TRACKS = (*FROM_NOTHING, *VARIED)
_BUILDS_ON = {"deep": ("vision", "shallow"), "sight": ("deep",), "reading": ("deep",), "whole": ("sight", "reading")}


def main(argv: list[str] | None = None) -> None:
    """Train the chosen tracks; after the last one save the model and report its accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and of the model, tiny_llava")
    parser.add_argument("--start", type=Path, help="folder of a saved tiny model to go on from, instead of nothing")
    parser.add_argument("--origin", default="an earlier tiny model", help="what the model card calls --start")
    parser.add_argument("--tracks", nargs="+", choices=TRACKS, help="what to train (default: all that are needed)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in the folder")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1; run two tracks side by side)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    wanted = args.tracks or (VARIED if args.start else TRACKS)
    try:
        for name in TRACKS:
            if name in wanted:
                train(name, args.out, args.start, args.resume, args.seed, args.device)
        if "whole" in wanted:
            finish(args.out, args.origin if args.start else None)
    except UserError as error:
        print(f"train_tiny: {error}", file=sys.stderr)
        sys.exit(2)


def train(name: str, out: Path, start: Path | None, resume: bool, seed: int, device: str) -> None:
    """Run one track.

    Raises
    ------
    UserError
        If a checkpoint is in the way, or one that the track builds on is missing.
    """
    if (out / f"{name}.pt").exists() and not resume:
        raise UserError(f"{out / f'{name}.pt'} exists: give --resume to go on from it, or another --out")
    tokenizer = build_tokenizer()
    shape = TinyShape(layers=recipe.SHALLOW_LAYERS) if name == "shallow" else TinyShape()
    codes = CodeBook(tokenizer, shape.width)
    packer = Packer(tokenizer)
    model = build_model(tokenizer, codes, shape, seed)
    begin(name, model, build_model(tokenizer, codes, TinyShape(layers=recipe.SHALLOW_LAYERS), seed), out, start)
    model.to(device)  # type: ignore[arg-type]  # transformers types this as a bound function
    codes.to(device)
    Track(name, stages_of(name, codes, packer), out, partial(print, flush=True)).run(model)


def stages_of(name: str, codes: CodeBook, packer: Packer) -> Sequence[Stage]:
    """The recipe of a track."""
    if name in ("vision", "sight"):
        return {"vision": recipe.vision_stages, "sight": recipe.sight_stages}[name](codes)
    makers = {
        "shallow": recipe.shallow_stages,
        "deep": recipe.deep_stages,
        "reading": recipe.reading_stages,
        "whole": recipe.whole_stages,
    }
    return makers[name](codes, packer)


def begin(name: str, model, shallow, out: Path, start: Path | None) -> None:
    """Load what the track starts from; `shallow` is scratch space of half the depth."""
    if name in ("sight", "reading") and start:
        if not (start / "model.safetensors").is_file():
            raise UserError(f"--start {start} holds no model.safetensors: give the folder of a saved tiny model")
        model.load_state_dict(LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32).state_dict())
        return
    states = [_finished(track, name, out) for track in _BUILDS_ON.get(name, ())]
    if name == "deep":
        shallow.load_state_dict(states[1])
        deepen(shallow, model)
        model.load_state_dict(_seeing(states[0]), strict=False)
    elif name == "whole":
        model.load_state_dict(states[1] | _seeing(states[0]))
    elif states:
        model.load_state_dict(states[0])


def _finished(track: str, needed_by: str, out: Path) -> dict[str, Tensor]:
    """Weights of a finished track."""
    path = out / f"{track}.pt"
    last = stages_of(track, *_throwaway())[-1].name
    state = torch.load(path, weights_only=True) if path.exists() else {"done": {}}
    if last not in state["done"]:
        raise UserError(f"the {needed_by} track needs the finished {track} track in {out}")
    return state["model"]


def _throwaway() -> tuple[CodeBook, Packer]:
    tokenizer = build_tokenizer()
    return CodeBook(tokenizer, TinyShape().width), Packer(tokenizer)


def _seeing(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of the weights that belongs to tower and projector."""
    return {name: value for name, value in state.items() if "vision_tower" in name or "multi_modal_projector" in name}


def finish(out: Path, origin: str | None) -> None:
    """Save the trained model with its card in ``out/tiny_llava``."""
    folder = out / "tiny_llava"
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, CodeBook(tokenizer, TinyShape().width), TinyShape())
    model.load_state_dict(_finished("whole", "exported", out))
    export(model, tokenizer, folder)
    seconds: dict[str, float] = {}
    for name in TRACKS:
        if (out / f"{name}.pt").exists():
            done = torch.load(out / f"{name}.pt", weights_only=True)["done"]
            seconds |= {f"{name}: {stage}": value for stage, value in done.items()}
    parameters = sum(weight.numel() for weight in model.parameters())
    card = model_card(model.config, parameters, seconds, torch.get_num_threads(), report(folder), origin)
    files.write(folder / "README.md", card)
    print(card)


if __name__ == "__main__":
    main()
