"""What a model does inside on single questions: the evidence behind core tokens.

These probes run the dense model once per question and read its FFNs with hooks; no method is installed, nothing is
changed. The figures drawn from them are in :mod:`corematching.inspection.evidence_figures`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

import corematching.models
from corematching.answering.conversation import prepare_images, render
from corematching.answering.generator import Answer
from corematching.answering.prompts import Question
from corematching.methods.core import coactivation_counts, core_neurons, match_counts
from corematching.models.families import family_of
from corematching.results.figures.about import NAMED, About, about_versions
from corematching.results.tables import MINI_BANNER

SUFFIX = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Example:
    """One question about one image.

    Attributes
    ----------
    image : PIL.Image
    question : str
        As the model is asked, benchmark suffix included.
    target : str
    benchmark : str
    """

    image: Image.Image
    question: str
    target: str
    benchmark: str = "gqa"


@dataclass(frozen=True)
class Evidence:
    """FFN activations of one prompt, summarised per decoder layer and visual token.

    Attributes
    ----------
    match, coactivation, cosine : ndarray of shape (layers, visual tokens)
        Core neurons of the sentence that a token activates; neurons it activates together with the last token of the
        prompt; cosine between its FFN input and the last token's.
    grid : tuple of int
        Rows and columns of visual tokens.
    question : str
        Its first line.
    about : corematching.results.figures.about.About
        What figures of it carry.
    """

    match: np.ndarray
    coactivation: np.ndarray
    cosine: np.ndarray
    grid: tuple[int, int]
    question: str = ""
    about: About = field(default=About("", ""))


@dataclass(frozen=True)
class Kept:
    """What one method left of a question's visual tokens (original indices), and what the model answered then."""

    tokens: Sequence[int]
    answer: str = ""


def about_model(model: Any, *facts: str) -> About:
    """What figures of this model carry: its name and type, what else is said, and the versions at work here."""
    folder = Path(model.config._name_or_path or type(model).__name__)
    versions = {}
    for package in NAMED:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    bundled = folder.is_relative_to(Path(corematching.models.__file__).parent)
    name = f"{folder.name} ({str(model.dtype).removeprefix('torch.')})"
    return about_versions([name, *facts], versions, MINI_BANNER if bundled else "")


def mini_examples(images: int = 3, questions: int = 2, seed: int = 0) -> list[Example]:
    """Questions of the bundled GQA about test scenes: ``questions`` of them for each of ``images`` scenes."""
    from corematching.benchmarks.mini.drawing import render as draw
    from corematching.benchmarks.mini.questions import questions_for
    from corematching.benchmarks.mini.scenes import make_scene

    found = []
    for number in range(images):
        scene = make_scene(seed + number, "test")
        asked = questions_for("gqa", scene, random.Random(seed + number))[:questions]
        found += [Example(draw(scene), question.text + SUFFIX, question.answer) for question in asked]
    return found


def matching_evidence(model: Any, processor: Any, example: Example, rho: float = 0.2, beta: float = 0.4) -> Evidence:
    """Probe one question.

    Parameters
    ----------
    model, processor
        As ``corematching.load_model`` returns them.
    example
        The question.
    rho, beta
        Core-neuron parameters; see :mod:`corematching.methods.core`.
    """
    family = family_of(model.config)
    grid = family.grid(model.config)  # refused where images have their own
    pictures = prepare_images([example.image], "pad", processor)
    text = render(processor, example.question, 1, "llava15")
    inputs = processor(text=text, images=pictures, return_tensors="pt").to(model.device, dtype=model.dtype)
    layers: Any = family.decoder(model).layers
    entered: list[torch.Tensor] = []
    activated: list[torch.Tensor] = []
    hooks = [layer.mlp.register_forward_pre_hook(lambda _, args: entered.append(args[0])) for layer in layers]
    hooks += [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: activated.append(args[0])) for layer in layers
    ]
    try:
        with torch.inference_mode():
            model(**inputs, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    visual = inputs["input_ids"][0] == family.image_token_id(model.config)
    width = family.geometry(model.config).ffn_width
    rows = [_layer(x, a, visual, rho, round(beta * width)) for x, a in zip(entered, activated, strict=True)]
    match, coactivation, cosine = (np.stack(values) for values in zip(*rows, strict=True))
    about = about_model(model, f"data {example.benchmark}")
    return Evidence(match, coactivation, cosine, grid, example.question.partition("\n")[0], about)


def answered(
    generator: Any, examples: Sequence[Example], methods: Mapping[str, Any]
) -> list[tuple[Example, dict[str, Kept]]]:
    """Ask every question under every method: what stays in the last decoder layer, and the answer.

    Parameters
    ----------
    generator : corematching.answering.generator.Generator
    examples
        The questions.
    methods
        Methods by the name they are shown under.
    """
    asked = [question_of(one, max_new_tokens=8) for one in examples]
    found = {name: generator.answer(asked, method) for name, method in methods.items()}
    return [(one, {name: kept(given[place]) for name, given in found.items()}) for place, one in enumerate(examples)]


def kept(answer: Answer) -> Kept:
    """What stayed in the last decoder layer, and the answer."""
    return Kept(answer.trace.visual_tokens[-1].tolist(), answer.text)


def question_of(example: Example, max_new_tokens: int) -> Question:
    """An example as a generator is asked it."""
    return Question(example.question, partial(_pictures, example), {"max_new_tokens": max_new_tokens})


def _pictures(example: Example) -> list[Any]:
    return [example.image]


def _layer(hidden: torch.Tensor, activations: torch.Tensor, visual: torch.Tensor, rho: float, count: int):
    """Match counts, co-activation counts and cosines of one layer's visual tokens; inputs are [1, n, ...]."""
    hidden, activations = hidden.float(), activations.float()
    valid = torch.ones(activations.shape[:2], dtype=torch.bool, device=activations.device)
    core = core_neurons(activations, valid, rho, count)
    tokens = activations[:, visual]
    values = (
        match_counts(tokens, core),
        coactivation_counts(tokens, activations[:, -1]),
        cosine_similarity(hidden[:, visual], hidden[:, -1:], dim=-1),
    )
    return [value[0].cpu().numpy() for value in values]


def rank_correlation(evidence: Sequence[Evidence], first: str = "coactivation", second: str = "cosine") -> np.ndarray:
    """Spearman's rank correlation per layer between two of an evidence's quantities: (questions, layers)."""
    from scipy.stats import spearmanr

    return np.array(
        [
            [float(spearmanr(a, b).statistic) for a, b in zip(getattr(e, first), getattr(e, second), strict=True)]
            for e in evidence
        ]
    )


def elbow(scores: np.ndarray) -> tuple[np.ndarray, int]:
    """Scores in descending order and how many tokens the elbow rule keeps of them.

    The rule is the method's own (:func:`corematching.methods.selection.elbow_keep`).
    """
    from corematching.methods.selection import elbow_keep

    row = torch.from_numpy(np.asarray(scores, dtype=np.float32))[None]
    kept = elbow_keep(row, torch.ones_like(row, dtype=torch.bool))
    return np.sort(scores)[::-1], int(kept.sum())
