"""Datasets beyond the ten whose answers or prompts are long: every object, a count step by step, many pictures.

What a right answer names is in column ``answer``: objects as "colour kind", separated by semicolons, and for counts a
colon and the number. Two datasets of the Hub have stand-ins in their own schemas.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from corematching.benchmarks.mini.drawing import render
from corematching.benchmarks.mini.families import of_category
from corematching.benchmarks.mini.files import Files, Row
from corematching.benchmarks.mini.scenes import COLOURS, Scene, SceneObject

IMAGES = (8, 16, 24, 32)
"""Pictures per question of ``Many-Images``, in turn."""
_PLURALS = {"shape": "shapes", "digit": "tiles with a number", "word": "signs with a word"}
_TYPES: Row = {"question_id": "str", "question": "str", "answer": "str", "image": ["image"]}

Scenes = Callable[[], Scene]
"""Gives the next scene of a dataset."""


def _named(items: Sequence[SceneObject]) -> str:
    return "; ".join(f"{item.colour} {item.kind}" for item in items)


def describe(scenes: Scenes, rng: random.Random, n: int) -> Files:
    """One picture each: name everything that is in it."""
    question = "Describe all objects in the image, each with its size, its pattern, its color and what it is."

    def rows() -> Iterator[tuple[str, str, list[Scene]]]:
        for _ in range(n):
            scene = scenes()
            yield question, _named(scene.objects), [scene]

    return _files(rows())


def count(scenes: Scenes, rng: random.Random, n: int) -> Files:
    """One picture each: name the objects of one category one by one, then say how many there are."""

    def rows() -> Iterator[tuple[str, str, list[Scene]]]:
        for _ in range(n):
            category = rng.choice(list(_PLURALS))
            items: list[SceneObject] = []
            while not items:
                scene = scenes()
                items = of_category(scene, category)
            question = (
                f"How many {_PLURALS[category]} are in the image? Name them one by one with their color, "
                "then say the number."
            )
            yield question, f"{_named(items)}: {len(items)}", [scene]

    return _files(rows())


def colour_question(colour: str) -> str:
    """What is asked about many pictures."""
    return f"Name every {colour} object in the images, in their order."


def many_images(scenes: Scenes, rng: random.Random, n: int) -> Files:
    """Eight to thirty-two pictures each: name the objects of one colour, picture by picture.

    A quarter as many questions as other datasets have, since each shows twenty pictures on average.
    """

    def rows() -> Iterator[tuple[str, str, list[Scene]]]:
        for number in range(max(2, n // 4)):
            shown = [scenes() for _ in range(IMAGES[number % len(IMAGES)])]
            colour = rng.choice(list(COLOURS))
            items = [item for scene in shown for item in scene.objects if item.colour == colour]
            yield colour_question(colour), _named(items), shown

    return _files(rows())


def chair(scenes: Scenes, rng: random.Random, n: int) -> Files:
    """Stand-in for COCO's pictures with their objects: what is written on the signs are COCO objects, mostly."""
    rows: list[Row] = []
    while len(rows) < n:
        scene = scenes()
        if signs := [item.kind for item in of_category(scene, "word")]:
            rows.append({"question_id": str(len(rows)), "image": render(scene), "gt_object": signs})
    types: Row = {"question_id": "str", "image": "image", "gt_object": ["str"]}
    return {"data/test-00000-of-00001.parquet": (types, rows)}


def muirbench(scenes: Scenes, rng: random.Random, n: int) -> Files:
    """Stand-in for MuirBench: which of two to four pictures shows what the question names."""
    rows: list[Row] = []
    while len(rows) < n:
        shown = [scenes() for _ in range(2 + len(rows) % 3)]
        right = rng.randrange(len(shown))
        item = rng.choice(shown[right].objects)
        others = [scene for place, scene in enumerate(shown) if place != right]
        if any((one.colour, one.kind) == (item.colour, item.kind) for scene in others for one in scene.objects):
            continue
        row: Row = {"idx": len(rows), "task": "Image-Text Matching", "image_relation": "Independent"}
        row |= {"image_type": "Drawing", "question": f"Which image shows a {item.colour} {item.kind}?"}
        row |= {"options": [f"Image {place + 1}" for place in range(len(shown))], "answer": "ABCD"[right]}
        rows.append(row | {"image_list": [render(scene) for scene in shown], "counterpart_idx": None})
    types: Row = dict.fromkeys(("task", "image_relation", "image_type", "question", "answer"), "str")
    types |= {"idx": "int", "counterpart_idx": "int", "options": ["str"], "image_list": ["image"]}
    return {"data/test-00000-of-00001.parquet": (types, rows)}


def _files(rows: Iterator[tuple[str, str, list[Scene]]]) -> Files:
    made: list[Row] = [
        {"question_id": str(number), "question": question, "answer": answer, "image": [render(one) for one in shown]}
        for number, (question, answer, shown) in enumerate(rows)
    ]
    return {"data/test-00000-of-00001.parquet": (_TYPES, made)}


#: Dataset -> writer. The order is part of the seeds: add new ones at the end.
LONG_WRITERS: dict[str, Callable[[Scenes, random.Random, int], Files]] = {
    "Describe-All": describe,
    "Count-Steps": count,
    "Many-Images": many_images,
    "mscoco_chair": chair,
    "MUIRBENCH": muirbench,
}
