"""Families of questions about scenes: open questions, and pairs of yes/no statements.

A *family* asks one kind of thing (a colour, a number, whether something exists) and knows the boxes that hold the
answer. Wrong statements are drawn from what the scene shows elsewhere and yes/no answers are a coin flip, so guessing
without the image does not pay.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from corematching.benchmarks.mini.scenes import COLOURS, DIGITS, SHAPES, SIZES, TEXTURES, WORDS, Scene, SceneObject

_MARGIN = 3.0  # patches by which places must differ before a question asks about them


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one scene.

    Attributes
    ----------
    family : str
        A key of :data:`FAMILIES`, or of MM-Vet's sentence families.
    text : str
        The question alone: no options, hints or instructions.
    answer : str
        What the stock metric accepts: a lower-case word, a digit, ``"yes"``/``"no"``, a letter, or a sentence (MM-Vet).
    choices : tuple of str or None
        Options of a lettered question.
    answer_index : int or None
        The right option's index.
    boxes : tuple of (x0, y0, x1, y1)
        Pixel boxes that hold the answer; empty where the answer is that something is absent.
    meta : dict
        What a writer needs besides: ``word`` (the open answer behind a letter), ``hint``, ``category``, ``subtask``,
        ``question_type``, ``capability``, ``key_phrases``, ``ocr_tokens`` as the benchmark has them.
    """

    family: str
    text: str
    answer: str
    choices: tuple[str, ...] | None = None
    answer_index: int | None = None
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    meta: dict = field(default_factory=dict)


NOUNS = {"shape": "object", "digit": "tile", "word": "sign"}


def pick(items: list[SceneObject], rng: random.Random) -> SceneObject | None:
    """One of the objects, or None where there is none."""
    return rng.choice(items) if items else None


def of_category(scene: Scene, *categories: str) -> list[SceneObject]:
    """The scene's objects of these categories."""
    return [item for item in scene.objects if item.category in categories]


def named(item: SceneObject) -> str:
    """Name an object by its colour, which is unique in a scene."""
    return f"the {item.colour} {NOUNS[item.category]}"


def _unique_kinds(scene: Scene) -> list[SceneObject]:
    kinds = [item.kind for item in scene.objects]
    return [item for item in scene.objects if kinds.count(item.kind) == 1]


def clear_sides(scene: Scene, axis: int) -> list[SceneObject]:
    """Objects well away from the image's middle line (axis 0: left or right; axis 1: top or bottom)."""
    return [item for item in scene.objects if abs(item.centre[axis] - 12) >= _MARGIN]


# --- open families --------------------------------------------------------------------------------


def ask_colour(scene: Scene, rng: random.Random) -> Question | None:
    """What color is the square?"""
    item = pick(_unique_kinds(scene), rng)
    if item is None:
        return None
    return Question("color", f"What color is the {_by_kind(item)}?", item.colour, boxes=(item.box,))


def _by_kind(item: SceneObject) -> str:
    return {"shape": "{}", "digit": "tile with number {}", "word": "sign with word {}"}[item.category].format(item.kind)


def ask_shape(scene: Scene, rng: random.Random) -> Question | None:
    """What shape is the red object?"""
    item = pick(of_category(scene, "shape"), rng)
    if item is None:
        return None
    return Question("shape", f"What shape is {named(item)}?", item.kind, boxes=(item.box,))


def ask_digit(scene: Scene, rng: random.Random) -> Question | None:
    """What number is on the red tile?"""
    item = pick(of_category(scene, "digit"), rng)
    if item is None:
        return None
    return Question("digit", f"What number is on {named(item)}?", item.kind, boxes=(item.box,))


def ask_word(scene: Scene, rng: random.Random) -> Question | None:
    """What word is on the red sign?"""
    item = pick(of_category(scene, "word"), rng)
    if item is None:
        return None
    return Question("word", f"What word is on {named(item)}?", item.kind, boxes=(item.box,))


def ask_texture(scene: Scene, rng: random.Random) -> Question | None:
    """What pattern is on the red object?"""
    item = pick(of_category(scene, "shape"), rng)
    if item is None:
        return None
    return Question("texture", f"What pattern is on {named(item)}?", item.texture, boxes=(item.box,))


def ask_size(scene: Scene, rng: random.Random) -> Question | None:
    """What size is the red object?"""
    item = pick(of_category(scene, "shape", "digit"), rng)
    if item is None:
        return None
    return Question("size", f"What size is {named(item)}?", item.size, boxes=(item.box,))


def ask_side(scene: Scene, rng: random.Random) -> Question | None:
    """Is the red object on the left or on the right?"""
    item = pick(clear_sides(scene, 0), rng)
    if item is None:
        return None
    return Question("side", f"Is {named(item)} on the left or on the right?", side_of(item), boxes=(item.box,))


def ask_height(scene: Scene, rng: random.Random) -> Question | None:
    """Is the red object at the top or at the bottom?"""
    item = pick(clear_sides(scene, 1), rng)
    if item is None:
        return None
    return Question("height", f"Is {named(item)} at the top or at the bottom?", height_of(item), boxes=(item.box,))


def side_of(item: SceneObject) -> str:
    """Left or right half of the image."""
    return "left" if item.centre[0] < 12 else "right"


def height_of(item: SceneObject) -> str:
    """Top or bottom half of the image."""
    return "top" if item.centre[1] < 12 else "bottom"


def ask_exists(scene: Scene, rng: random.Random) -> Question | None:
    """Is there a red square in the image?"""
    if rng.random() < 0.5:
        item = pick(of_category(scene, "shape"), rng)
        if item is None:
            return None
        return Question("exists", exists_text(item.colour, item.kind), "yes", boxes=(item.box,))
    return absent_combination(scene, rng, rng.choice(("random", "popular", "adversarial")))


def exists_text(colour: str, kind: str) -> str:
    """POPE's question."""
    return f"Is there a {colour} {kind} in the image?"


def absent_combination(scene: Scene, rng: random.Random, category: str) -> Question | None:
    """A combination that the scene lacks.

    As in POPE: ``random`` shows neither half, ``popular`` one of them, ``adversarial`` both, on different objects.
    """
    shapes = of_category(scene, "shape")
    here = {(item.colour, item.kind) for item in shapes}
    colours, kinds = {item.colour for item in scene.objects}, {item.kind for item in shapes}
    wanted = {"random": 0, "popular": 1, "adversarial": 2}[category]
    options = [
        (colour, kind)
        for colour in COLOURS
        for kind in SHAPES
        if (colour, kind) not in here and (colour in colours) + (kind in kinds) == wanted
    ]
    return Question("exists", exists_text(*rng.choice(options)), "no") if options else None


def ask_count(scene: Scene, rng: random.Random) -> Question | None:
    """How many squares are there?"""
    counts = {kind: sum(item.kind == kind for item in scene.objects) for kind in SHAPES}
    number = rng.choice(sorted(set(counts.values())))
    kind = rng.choice([kind for kind in SHAPES if counts[kind] == number])
    boxes = tuple(item.box for item in scene.objects if item.kind == kind)
    return Question("count", f"How many {plural(kind)} are there?", str(number), boxes=boxes)


def plural(kind: str) -> str:
    """The plural of a shape's name."""
    return kind + ("es" if kind.endswith("s") else "s")


def ask_compound(scene: Scene, rng: random.Random) -> Question | None:
    """What color is the striped square? (Asked only where there are several squares.)"""
    shapes = of_category(scene, "shape")
    options = []
    for item in shapes:
        rivals = [other for other in shapes if other.kind == item.kind and other is not item]
        options += [
            (item, value)
            for value, attribute in ((item.texture, "texture"), (item.size, "size"))
            if rivals and all(getattr(other, attribute) != value for other in rivals)
        ]
    if not options:
        return None
    item, value = rng.choice(options)
    return Question("compound", f"What color is the {value} {item.kind}?", item.colour, boxes=(item.box,))


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


FAMILIES: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "color": ask_colour,
    "shape": ask_shape,
    "digit": ask_digit,
    "word": ask_word,
    "texture": ask_texture,
    "size": ask_size,
    "side": ask_side,
    "height": ask_height,
    "exists": ask_exists,
    "count": ask_count,
    "compound": ask_compound,
}

POOLS: dict[str, tuple[str, ...]] = {
    "color": tuple(COLOURS),
    "compound": tuple(COLOURS),
    "shape": SHAPES,
    "digit": DIGITS,
    "word": WORDS,
    "texture": TEXTURES,
    "size": SIZES,
    "side": ("left", "right"),
    "height": ("top", "bottom"),
}

# --- yes/no statements (MME) ----------------------------------------------------------------------

_STATEMENTS = {
    "color": lambda item, value: f"Is the {_by_kind(item)} {value}?",
    "shape": lambda item, value: f"Is {named(item)} a {value}?",
    "digit": lambda item, value: f"Is the number on {named(item)} {value}?",
    "word": lambda item, value: f"Is the word on {named(item)} {value}?",
    "texture": lambda item, value: f"Is {named(item)} {value}?",
    "size": lambda item, value: f"Is {named(item)} {value}?",
    "side": lambda item, value: f"Is {named(item)} on the {value}?",
    "height": lambda item, value: f"Is {named(item)} at the {value}?",
}

# MME's fourteen subtasks and the statement family that stands for each in the mini suite.
MME_SUBTASKS: dict[str, str] = {
    "existence": "exists",
    "count": "count",
    "position": "side",
    "color": "color",
    "posters": "texture",
    "celebrity": "size",
    "scene": "height",
    "landmark": "color",
    "artwork": "shape",
    "OCR": "word",
    "commonsense_reasoning": "shape",
    "numerical_calculation": "digit",
    "text_translation": "word",
    "code_reasoning": "digit",
}


def statement_pair(family: str, scene: Scene, rng: random.Random) -> tuple[Question, Question] | None:
    """The same statement made truly and falsely, in this order: two yes/no questions about one object."""
    if family == "exists":
        item = pick(of_category(scene, "shape"), rng)
        false = absent_combination(scene, rng, rng.choice(("popular", "adversarial")))
        if item is None or false is None:
            return None
        return replace(false, text=exists_text(item.colour, item.kind), answer="yes", boxes=(item.box,)), false
    if family == "count":
        return _count_pair(scene, rng)
    candidates = {
        "color": _unique_kinds(scene),
        "size": of_category(scene, "shape", "digit"),
        "side": clear_sides(scene, 0),
        "height": clear_sides(scene, 1),
        "texture": of_category(scene, "shape"),
    }.get(family)
    item = pick(of_category(scene, family) if candidates is None else candidates, rng)
    if item is None:
        return None
    truth = _value(item, family)
    lie = rng.choice(rivals(scene, family, truth, rng, 1))
    make = _STATEMENTS[family]
    true, false = (Question(family, make(item, v), _yes(v == truth), boxes=(item.box,)) for v in (truth, lie))
    return true, false


def _count_pair(scene: Scene, rng: random.Random) -> tuple[Question, Question] | None:
    """Are there any squares in the image? (The mini suite's stand-in for MME's count: some against none.)"""
    here = [kind for kind in SHAPES if any(item.kind == kind for item in scene.objects)]
    gone = [kind for kind in SHAPES if kind not in here]
    if not here or not gone:
        return None
    kinds = (rng.choice(here), rng.choice(gone))
    boxes = tuple(item.box for item in scene.objects if item.kind == kinds[0])
    yes, no = (f"Are there any {plural(kind)} in the image?" for kind in kinds)
    return Question("count", yes, "yes", boxes=boxes), Question("count", no, "no")


def _value(item: SceneObject, family: str) -> str:
    return {
        "color": item.colour,
        "texture": item.texture,
        "size": item.size,
        "side": side_of(item),
        "height": height_of(item),
    }.get(family, item.kind)


def rivals(scene: Scene, family: str, truth: str, rng: random.Random, count: int) -> list[str]:
    """Wrong values, those that the scene shows elsewhere first."""
    pool = [value for value in POOLS[family] if value != truth]
    rng.shuffle(pool)
    shown = {item.colour if family in ("color", "compound") else item.kind for item in scene.objects}
    return sorted(pool, key=lambda value: value not in shown)[:count]
