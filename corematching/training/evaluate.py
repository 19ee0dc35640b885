"""Accuracy of the tiny model on test scenes, by benchmark and family, with ablations of the image.

Teacher-forced: an answer counts when every one of its tokens, the end included, is the most likely one. That is
exactly when greedy decoding produces the answer, at a fraction of the cost.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from corematching.benchmarks.mini.questions import BENCHMARK_FAMILIES, Question, questions_for
from corematching.benchmarks.mini.scenes import GRID, IMAGE_SIZE, Scene, make_scene
from corematching.training.codes import CodeBook, PatchLabels
from corematching.training.language import Packer, pixels_of
from corematching.training.reading import IGNORED, run_layers
from corematching.training.vision import pixels, visual_features
from corematching.training.vocabulary import build_tokenizer

CONDITIONS = ("dense", "blank", "random-64", "oracle")
REPORTED = ("dense", "blank", "random-64")
_PACKED = 40  # questions in one forward pass


@dataclass(frozen=True)
class Tally:
    """Right answers out of `total`."""

    right: int = 0
    total: int = 0

    @property
    def accuracy(self) -> float:
        """Share of right answers, in percent."""
        return 100 * self.right / max(self.total, 1)

    @property
    def error(self) -> float:
        """Standard error of the accuracy in points, questions taken as independent."""
        share = self.right / max(self.total, 1)
        return 100 * math.sqrt(share * (1 - share) / max(self.total, 1))

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.right + other.right, self.total + other.total)


@torch.no_grad()
def evaluate(
    model,
    packer: Packer,
    codes: CodeBook,
    condition: str = "dense",
    benchmarks: tuple[str, ...] = tuple(BENCHMARK_FAMILIES),
    images: int = 110,
    seed: int = 0,
) -> dict[tuple[str, str], Tally]:
    """Answer the benchmarks' questions about `images` test scenes, at most ten of each benchmark for a scene.

    Parameters
    ----------
    condition : {"dense", "blank", "random-64", "oracle"}
        The image as it is; a uniform grey image; 64 random visual tokens of 576; the sums of codes instead of the
        tower.

    Returns
    -------
    dict
        ``(benchmark, family)`` to tally.

    Raises
    ------
    ValueError
        If the condition is unknown.
    """
    if condition not in CONDITIONS:
        raise ValueError(f"unknown condition {condition!r}: use one of {', '.join(CONDITIONS)}")
    tallies: dict[tuple[str, str], Tally] = defaultdict(Tally)
    for index in range(images):
        scene = _scene(index, seed)
        visual, chosen = _visual(model, codes, scene, condition, index)
        asked = [(name, question) for name in benchmarks for question in _questions(name, index, seed)]
        for start in range(0, len(asked), _PACKED):
            part = asked[start : start + _PACKED]
            batch = packer.pack([scene], chosen, [part], random.Random(f"{seed}:{index}:{start}"))
            _, last = run_layers(model, batch, visual)
            guesses = model.lm_head(model.model.language_model.norm(last)).argmax(-1)[0]
            for (name, question), right in zip(part, _right(guesses, batch.targets[0])):
                tallies[name, question.family] += Tally(int(right), 1)
    return dict(tallies)


def _scene(index: int, seed: int) -> Scene:
    return make_scene(seed * 1_000_000 + index, "test")


def _questions(benchmark: str, index: int, seed: int) -> list[Question]:
    """At most ten questions (whole pairs) of a benchmark about an image."""
    return questions_for(benchmark, _scene(index, seed), random.Random(f"{seed}:{benchmark}:{index}"))[:10]


def _visual(model, codes: CodeBook, scene, condition: str, index: int) -> tuple[Tensor, Tensor]:
    """Visual tokens (1, kept, width) and their raster indices (1, kept)."""
    chosen = torch.arange(GRID * GRID)[None]
    if condition == "oracle":
        labels = PatchLabels.of([scene])
        return codes.visual_tokens(labels, chosen // GRID, chosen % GRID), chosen
    blank = np.full((1, IMAGE_SIZE, IMAGE_SIZE, 3), 128, dtype=np.uint8)
    visual = visual_features(model, pixels(blank) if condition == "blank" else pixels_of([scene]))
    if condition == "random-64":
        generator = torch.Generator().manual_seed(index)
        chosen = torch.randperm(GRID * GRID, generator=generator)[:64].sort().values[None]
        visual = visual[:, chosen[0]]
    return visual, chosen


def _right(guesses: Tensor, targets: Tensor) -> Iterator[bool]:
    """Whether each packed answer is right: runs of targets, each ending with the end of its answer."""
    scored = (targets != IGNORED).tolist()
    hits = (guesses == targets).tolist()
    current = None
    for on, hit in zip([*scored, False], [*hits, False]):
        if on:
            current = hit if current is None else current and hit
        elif current is not None:
            yield current
            current = None


def by_benchmark(tallies: dict[tuple[str, str], Tally]) -> dict[str, Tally]:
    """Sum the families of each benchmark."""
    sums: dict[str, Tally] = defaultdict(Tally)
    for (benchmark, _), tally in tallies.items():
        sums[benchmark] += tally
    return dict(sums)


def chance(benchmark: str, images: int, seed: int = 0) -> float:
    """Expected share of right answers, in percent, of the best guess that sees the question but not the image.

    Lettered and yes/no questions: uniform over the options. Others: the most frequent answer of the question's family.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    guessed, total = 0.0, 0
    for index in range(images):
        for question in _questions(benchmark, index, seed):
            total += 1
            if question.choices:
                guessed += 1 / len(question.choices)
            else:
                answers[question.family][question.answer] += 1
    guessed += sum(counts.most_common(1)[0][1] for counts in answers.values())
    return 100 * guessed / max(total, 1)


def report(folder: Path, images: int = 40, benchmarks: tuple[str, ...] = tuple(BENCHMARK_FAMILIES)) -> str:
    """Two Markdown tables for a saved model: accuracy by benchmark under each condition, and the mini GQA by family."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = build_tokenizer()
    packer, codes = Packer(tokenizer), CodeBook(tokenizer, model.lm_head.in_features)
    results = {c: evaluate(model, packer, codes, c, benchmarks, images) for c in REPORTED}
    sums = {c: by_benchmark(tallies) for c, tallies in results.items()}
    lines = [f"| benchmark | n | {' | '.join(REPORTED)} | chance |", "|---" * (len(REPORTED) + 3) + "|"]
    for benchmark in benchmarks:
        row = [_cell(sums[c][benchmark]) for c in REPORTED]
        guess = chance(benchmark, images)
        lines.append(f"| {benchmark} | {sums['dense'][benchmark].total} | {' | '.join(row)} | {guess:.1f} |")
    lines += ["", f"| GQA family | n | {' | '.join(REPORTED)} |", "|---" * (len(REPORTED) + 2) + "|"]
    for family in BENCHMARK_FAMILIES["gqa"]:
        parts = [results[c].get(("gqa", family), Tally()) for c in REPORTED]
        lines.append(f"| {family} | {parts[0].total} | {' | '.join(map(_cell, parts))} |")
    return "\n".join(lines)


def _cell(tally: Tally) -> str:
    return f"{tally.accuracy:.1f} ± {tally.error:.1f}"
