"""The ten benchmarks' forms of the question families.

A benchmark is a choice of families and a form: open answer, yes/no, lettered choices, short sentence.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from corematching.benchmarks.mini.families import (
    FAMILIES,
    MME_SUBTASKS,
    POOLS,
    Question,
    absent_combination,
    clear_sides,
    exists_text,
    height_of,
    named,
    of_category,
    pick,
    rivals,
    side_of,
    statement_pair,
)
from corematching.benchmarks.mini.scenes import COLOURS, SHAPES, Scene

__all__ = ["BENCHMARK_FAMILIES", "HINTS", "LETTERS", "UNANSWERABLE", "Question", "questions_for"]

UNANSWERABLE = "unanswerable"
LETTERS = "ABCD"

BENCHMARK_FAMILIES: dict[str, tuple[str, ...]] = {
    "vqav2": ("color", "shape", "digit", "exists", "count", "compound"),
    "gqa": ("color", "shape", "digit", "word", "texture", "size", "side", "height", "exists", "compound"),
    "vizwiz": ("color", "shape", "digit", "word"),
    "scienceqa": ("color", "shape", "digit", "texture", "size", "side", "height"),
    "textvqa": ("word", "digit"),
    "pope": ("exists",),
    "mme": tuple(MME_SUBTASKS),
    "mmbench": ("color", "shape", "digit", "word"),
    "seedbench": ("color", "shape", "digit", "word"),
    "mmvet": ("describe", "read", "place"),
}
HINTS = ("The image shows shapes, tiles and signs.", "Each object has its own color.")


def questions_for(benchmark: str, scene: Scene, rng: random.Random) -> list[Question]:
    """Questions about a scene in a benchmark's form: at most one for each family, in random order.

    Parameters
    ----------
    benchmark : str
        A key of :data:`BENCHMARK_FAMILIES`.
    scene : Scene
    rng : random.Random
        Decides what is asked; equal states give equal questions.

    Returns
    -------
    list of Question
        Empty where the scene has nothing to ask about. For ``"mme"``: pairs, the true statement right before the false
        one, a pair for each of the fourteen subtasks that the scene allows.

    Raises
    ------
    ValueError
        If the benchmark is unknown.
    """
    if benchmark not in BENCHMARK_FAMILIES:
        raise ValueError(f"unknown mini benchmark {benchmark!r}: use one of {', '.join(BENCHMARK_FAMILIES)}")
    families = list(BENCHMARK_FAMILIES[benchmark])
    rng.shuffle(families)
    return [question for family in families for question in _FORMS.get(benchmark, _open)(family, scene, rng)]


def _open(family: str, scene: Scene, rng: random.Random) -> list[Question]:
    question = FAMILIES[family](scene, rng)
    return [question] if question else []


def _vizwiz(family: str, scene: Scene, rng: random.Random) -> list[Question]:
    """An open question; three in ten ask about something that is not in the image."""
    if rng.random() >= 0.3:
        return _open(family, scene, rng)
    if family == "color":
        gone = [kind for kind in SHAPES if all(item.kind != kind for item in scene.objects)]
        text = f"What color is the {rng.choice(gone)}?" if gone else None
    else:
        colour = rng.choice([c for c in COLOURS if all(item.colour != c for item in scene.objects)])
        text = {
            "shape": f"What shape is the {colour} object?",
            "digit": f"What number is on the {colour} tile?",
            "word": f"What word is on the {colour} sign?",
        }[family]
    return [Question(family, text, UNANSWERABLE)] if text else []


def _textvqa(family: str, scene: Scene, rng: random.Random) -> list[Question]:
    """A reading question with everything written in the image as OCR tokens, in no particular order."""
    tokens = [item.kind for item in of_category(scene, "word", "digit")]
    rng.shuffle(tokens)
    return [replace(question, meta={"ocr_tokens": tuple(tokens)}) for question in _open(family, scene, rng)]


def _pope(family: str, scene: Scene, rng: random.Random) -> list[Question]:
    """One question that is true and one that is not; both carry the negative's category, as POPE's subsets do."""
    category = rng.choice(("random", "popular", "adversarial"))
    item, negative = pick(of_category(scene, "shape"), rng), absent_combination(scene, rng, category)
    if item is None or negative is None:
        return []
    positive = Question("exists", exists_text(item.colour, item.kind), "yes", boxes=(item.box,))
    return [replace(question, meta={"category": category}) for question in (positive, negative)]


def _mme(subtask: str, scene: Scene, rng: random.Random) -> list[Question]:
    pair = statement_pair(MME_SUBTASKS[subtask], scene, rng)
    return [replace(question, meta={"subtask": subtask}) for question in pair or ()]


def _lettered(count: int | None, *labels: str) -> Callable[[str, Scene, random.Random], list[Question]]:
    """Turn an open family into choices: `count` of them, or two to four; `labels` name the family in meta."""

    def form(family: str, scene: Scene, rng: random.Random) -> list[Question]:
        question = FAMILIES[family](scene, rng)
        if question is None:
            return []
        number = min(count or rng.randint(2, 4), len(POOLS[family]))
        choices = [question.answer, *rivals(scene, family, question.answer, rng, number - 1)]
        rng.shuffle(choices)
        index = choices.index(question.answer)
        hint = rng.choice(HINTS) if rng.random() < 0.3 else ""
        extra = {"word": question.answer, "hint": hint} | {label: _LABELS[label][family] for label in labels}
        return [replace(question, answer=LETTERS[index], choices=tuple(choices), answer_index=index, meta=extra)]

    return form


_LABELS: dict[str, dict[str, str]] = {
    "category": {
        "color": "attribute_recognition",
        "shape": "attribute_recognition",
        "digit": "ocr",
        "word": "ocr",
    },
    "l2_category": {
        "color": "finegrained_perception (instance-level)",
        "shape": "finegrained_perception (instance-level)",
        "digit": "coarse_perception",
        "word": "coarse_perception",
    },
    "question_type": {
        "color": "Instance Attributes",
        "shape": "Instance Identity",
        "digit": "Text Understanding",
        "word": "Text Understanding",
    },
}


def _mmvet(family: str, scene: Scene, rng: random.Random) -> list[Question]:
    """A question answered by a short sentence; ``key_phrases`` are what a judge looks for."""
    phrases: tuple[str, ...]
    if family == "read":
        item = pick(of_category(scene, "word", "digit"), rng)
        if item is None:
            return []
        thing = "word" if item.category == "word" else "number"
        text, sentence, phrases = f"What does {named(item)} say?", f"It says the {thing} {item.kind}", (item.kind,)
        capability = "ocr"
    elif family == "place":
        clear = [item for item in clear_sides(scene, 0) if item in clear_sides(scene, 1)]
        item = pick(clear, rng)
        if item is None:
            return []
        phrases = (height_of(item), side_of(item))
        text, sentence = f"Where is {named(item)}?", "It is at the {} {}".format(*phrases)
        capability = "spat"
    else:
        item = pick(of_category(scene, "shape"), rng)
        if item is None:
            return []
        phrases = (item.size, item.texture, item.kind)
        text, sentence = f"Describe {named(item)}.", "It is a {} {} {}".format(*phrases)
        capability = "rec,gen"
    meta = {"key_phrases": phrases, "capability": capability}
    return [Question(family, text, sentence, boxes=(item.box,), meta=meta)]


_FORMS: dict[str, Callable[[str, Scene, random.Random], list[Question]]] = {
    "vizwiz": _vizwiz,
    "textvqa": _textvqa,
    "pope": _pope,
    "mme": _mme,
    "mmvet": _mmvet,
    "scienceqa": _lettered(None),
    "mmbench": _lettered(4, "category", "l2_category"),
    "seedbench": _lettered(4, "question_type"),
}
