"""Write the mini suite as parquet files in the layout and the schemas of the ten real datasets.

Files are made on first use, in a folder whose name holds a checksum of the generator's own source, the number of
questions and the seed, so that no change of any of them can meet old files. Damaged files are made again.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from PIL import Image

from corematching.benchmarks.mini.drawing import render
from corematching.benchmarks.mini.files import MANIFEST, Files, Row, intact, publish
from corematching.benchmarks.mini.long import LONG_WRITERS
from corematching.benchmarks.mini.questions import MME_SUBTASKS, Question, questions_for
from corematching.benchmarks.mini.scenes import Scene, make_scene
from corematching.errors import UserError
from corematching.files import cache_home

VERSION = 2
"""Of the suite: 1 had grey backgrounds, three to six objects of two to four patches and no distractors."""
_SCENES_PER_SEED = 1_000_000
_LONG_BLOCK = 1_000_000
"""Blocks of scenes from here on belong to the datasets beyond the ten."""
_LETTERS = "ABCD"
_VIDEO_FRAMES = 3
_IDLE = 5
"""Times in a row that asking about a scene again brings nothing new, before it counts as asked out."""


def ensure_mini(folder: str, n: int, seed: int, per_image: int | None = None) -> Path:
    """Return the cached suite that holds dataset `folder`, writing or repairing it first if need be.

    Parameters
    ----------
    folder
        Dataset repository without owner, a key of `WRITERS` or `LONG_WRITERS`.
    n
        Questions per benchmark.
    seed
        Seed of the generator.
    per_image
        See `write_mini`.
    """
    root = _suite(n, seed, per_image)
    if not intact(root / folder):
        write_mini(root, n, seed, [folder], per_image)
    return root


def content_version(folder: str, n: int, seed: int, per_image: int | None = None) -> str:
    """Name of the generated content: depends on rows and pixels, not on how the files are compressed."""
    return _version(ensure_mini(folder, n, seed, per_image) / folder, _named(n, seed, per_image))


def version_at_hand(folder: str, n: int, seed: int, per_image: int | None = None) -> str | None:
    """`content_version` if the dataset has been written before; None if not."""
    dataset = _suite(n, seed, per_image) / folder
    return _version(dataset, _named(n, seed, per_image)) if (dataset / MANIFEST).is_file() else None


def _version(dataset: Path, named: str) -> str:
    manifest = json.loads((dataset / MANIFEST).read_text(encoding="utf-8"))
    return f"mini{VERSION}-{named}-{manifest['content'][:12]}"


def _named(n: int, seed: int, per_image: int | None) -> str:
    return f"n{n}-s{seed}" + (f"-i{per_image}" if per_image else "")


def _suite(n: int, seed: int, per_image: int | None) -> Path:
    return cache_home() / "mini" / f"{_generator()}-{_named(n, seed, per_image)}"


def write_mini(
    root: Path, n: int, seed: int, folders: Iterable[str] | None = None, per_image: int | None = None
) -> None:
    """Write datasets below `root`, each complete or not at all.

    Parameters
    ----------
    root
        Gets one folder per dataset, named like its repository, with a ``manifest.json`` of SHA-256 sums.
    n
        Questions per benchmark; rounded up to whole pairs, rotations and subsets.
    seed
        Equal seeds give equal rows and pixels.
    folders
        Keys of `WRITERS` and `LONG_WRITERS`; None writes the former.
    per_image
        Questions about each image, instead of the one to three that a dataset has here (GQA asks some thirty). Images
        that allow fewer different questions get fewer; POPE, MME and the rotations of MMBench keep theirs.
    """
    for folder in WRITERS if folders is None else folders:
        if folder not in (*WRITERS, *LONG_WRITERS):
            raise UserError(f"the mini suite has no dataset {folder!r}; it has {', '.join((*WRITERS, *LONG_WRITERS))}")
        source = _Source(folder, seed, per_image)
        if folder in LONG_WRITERS:
            publish(root / folder, LONG_WRITERS[folder](source.only_scene, source.rng, n))
        else:
            publish(root / folder, WRITERS[folder](source, n))


@functools.cache
def _generator() -> str:
    """Checksum of the code that draws, asks and writes."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:10]


class _Source:
    """Scenes of one dataset and the questions about them; no two datasets or seeds share a scene."""

    def __init__(self, folder: str, seed: int, per_image: int | None = None) -> None:
        self.per_image = per_image
        if folder in LONG_WRITERS:
            block = _LONG_BLOCK + seed * len(LONG_WRITERS) + list(LONG_WRITERS).index(folder)
        else:
            block = seed * len(WRITERS) + list(WRITERS).index(folder)
        self._numbers = itertools.count(block * _SCENES_PER_SEED)
        self.rng = random.Random(f"{folder} {seed}")

    def scene(self) -> tuple[int, Scene]:
        """The next scene and its number within the dataset."""
        number = next(self._numbers)
        return number % _SCENES_PER_SEED, make_scene(number, "test")

    def only_scene(self) -> Scene:
        """The next scene."""
        return self.scene()[1]

    def ask(self, benchmark: str, n: int, per_scene: int) -> Iterator[tuple[int, Image.Image, Question]]:
        """`n` questions with scene number and picture, at most `per_scene` (or what was asked for) for each scene."""
        asked = 0
        while asked < n:
            number, scene = self.scene()
            questions = questions_for(benchmark, scene, self.rng)
            if self.per_image:
                questions, per_scene = self._more(benchmark, scene, questions), self.per_image
            questions = questions[: min(per_scene, n - asked)]
            if not questions:
                continue
            picture = render(scene)
            for question in questions:
                yield number, picture, question
            asked += len(questions)

    def _more(self, benchmark: str, scene: Scene, questions: list[Question]) -> list[Question]:
        """These questions and different ones, until there are enough or asking again brings nothing new."""
        assert self.per_image is not None
        found, idle = {question.text: question for question in questions}, 0
        while len(found) < self.per_image and idle < _IDLE:
            before = len(found)
            for question in questions_for(benchmark, scene, self.rng):
                found.setdefault(question.text, question)
            idle = 0 if len(found) > before else idle + 1
        return list(found.values())

    def annotators(self, question: Question, other: str) -> list[str]:
        """Ten answers, of which up to three disagree, as real annotators do; the score of the right one stays 1."""
        wrong = self.rng.randrange(4)
        answers = [question.answer] * (10 - wrong) + [other] * wrong
        self.rng.shuffle(answers)
        return answers


def _gqa(source: _Source, n: int) -> Files:
    questions, images = [], {}
    for i, (number, picture, question) in enumerate(source.ask("gqa", n, per_scene=2)):
        image_id = f"n{number:06d}"
        images[image_id] = picture
        row: Row = {"id": f"{i:08d}", "imageId": image_id, "question": question.text, "answer": question.answer}
        row |= {"fullAnswer": f"The answer is {question.answer}.", "isBalanced": "true"}
        questions.append(row | {"types": {"semantic": question.family, "structural": "query", "detailed": ""}})
    types: Row = dict.fromkeys(("id", "imageId", "question", "answer", "fullAnswer", "isBalanced"), "str")
    types["types"] = {"semantic": "str", "structural": "str", "detailed": "str"}
    pictures = [{"id": key, "image": picture} for key, picture in images.items()]
    return {
        "testdev_balanced_instructions/testdev-00000-of-00001.parquet": (types, questions),
        "testdev_balanced_images/testdev-00000-of-00001.parquet": ({"id": "str", "image": "image"}, pictures),
    }


def _vqav2(source: _Source, n: int) -> Files:
    rows = []
    for i, (number, picture, question) in enumerate(source.ask("vqav2", n, per_scene=3)):
        answers = [
            {"answer": answer, "answer_confidence": "yes" if answer == question.answer else "maybe", "answer_id": k}
            for k, answer in enumerate(source.annotators(question, "unknown"), 1)
        ]
        kind = "yes/no" if question.answer in ("yes", "no") else "number" if question.answer.isdigit() else "other"
        row: Row = {"question_type": " ".join(question.text.split()[:2]).lower(), "answers": answers}
        row |= {"multiple_choice_answer": question.answer, "answer_type": kind, "image_id": number}
        rows.append(row | {"question_id": number * 1000 + i, "question": question.text, "image": picture})
    types: Row = {
        "question_type": "str",
        "multiple_choice_answer": "str",
        "answers": [{"answer": "str", "answer_confidence": "str", "answer_id": "int"}],
        "image_id": "int",
        "answer_type": "str",
        "question_id": "int",
        "question": "str",
        "image": "image",
    }
    test = [row | {"answers": None, "multiple_choice_answer": None, "answer_type": None} for row in rows]
    return {
        "data/validation-00000-of-00001.parquet": (types, rows),
        "data/test-00000-of-00001.parquet": (types, test),
    }


def _vizwiz(source: _Source, n: int) -> Files:
    rows = []
    for i, (_, picture, question) in enumerate(source.ask("vizwiz", n, per_scene=1)):
        category = "unanswerable" if question.answer == "unanswerable" else "other"
        other = "unsuitable" if category == "unanswerable" else "unanswerable"
        row: Row = {"question_id": f"VizWiz_val_{i:08d}.jpg", "image": picture, "question": question.text}
        rows.append(row | {"answers": source.annotators(question, other), "category": category})
    types = {"question_id": "str", "image": "image", "question": "str", "answers": ["str"], "category": "str"}
    return {"data/val-00000-of-00001.parquet": (types, rows)}


def _scienceqa(source: _Source, n: int) -> Files:
    rows = []
    for _, picture, question in source.ask("scienceqa", n, per_scene=2):
        word = question.meta["word"]
        row: Row = {"image": picture, "question": question.text, "choices": list(question.choices or ())}
        row |= {"answer": question.answer_index, "hint": question.meta.get("hint", ""), "task": "closed choice"}
        row |= {"grade": "grade2", "subject": "natural science", "topic": "pictures", "category": question.family}
        row |= {"skill": f"Read the {question.family} off a picture", "lecture": "Look at the named object."}
        rows.append(row | {"solution": f"The picture shows {word}."})
    types: Row = dict.fromkeys(rows[0], "str") | {"image": "image", "choices": ["str"], "answer": "int"}
    return {"ScienceQA-IMG/test-00000-of-00001.parquet": (types, rows)}


def _textvqa(source: _Source, n: int) -> Files:
    rows = []
    for i, (number, picture, question) in enumerate(source.ask("textvqa", n, per_scene=2)):
        row: Row = {"image_id": f"{number:016x}", "question_id": i, "question": question.text, "image": picture}
        row |= {"question_tokens": question.text.lower().rstrip("?").split(), "image_width": picture.width}
        row |= {"image_height": picture.height, "answers": source.annotators(question, "unanswerable")}
        rows.append(row | {"image_classes": [], "set_name": "val", "ocr_tokens": list(question.meta["ocr_tokens"])})
    types: Row = dict.fromkeys(("question_id", "image_width", "image_height"), "int")
    types |= dict.fromkeys(("image_id", "question", "set_name"), "str") | {"image": "image"}
    types |= {key: ["str"] for key in ("question_tokens", "answers", "image_classes", "ocr_tokens")}
    return {"data/validation-00000-of-00001.parquet": (types, rows)}


def _pope(source: _Source, n: int) -> Files:
    """As many questions for each subset, answers half yes and half no."""
    subsets: dict[str, list[Row]] = {"adversarial": [], "popular": [], "random": []}
    wanted = 2 * -(-n // (2 * len(subsets)))
    while any(len(rows) < wanted for rows in subsets.values()):
        number, scene = source.scene()
        pair = questions_for("pope", scene, source.rng)[:2]
        rows = subsets[pair[0].meta["category"]] if pair else []
        if not pair or len(rows) >= wanted:
            continue
        picture = render(scene)
        for question in pair:
            row: Row = {"id": str(len(rows)), "question_id": str(len(rows) + 1), "question": question.text}
            row |= {"answer": question.answer, "image_source": f"mini_{number:012d}", "image": picture}
            rows.append(row | {"category": question.meta["category"]})
    types: Row = dict.fromkeys(("id", "question_id", "question", "answer", "image_source", "category"), "str")
    types["image"] = "image"
    files: Files = {f"Full/{name}-00000-of-00001.parquet": (types, rows) for name, rows in subsets.items()}
    return files | {"data/test-00000-of-00001.parquet": (types, [row for rows in subsets.values() for row in rows])}


def _mme(source: _Source, n: int) -> Files:
    """Subtasks in turn, one image and two questions each time."""
    rows = []
    for subtask in itertools.islice(itertools.cycle(MME_SUBTASKS), -(-n // 2)):
        pair: list[Question] = []
        while not pair:
            number, scene = source.scene()
            pair = [
                question for question in questions_for("mme", scene, source.rng) if question.meta["subtask"] == subtask
            ]
        picture = render(scene)
        for question in pair[:2]:
            row: Row = {"question_id": f"{subtask}/{number:06d}.png", "image": picture, "category": subtask}
            row |= {"question": f"{question.text} Please answer yes or no.", "answer": question.answer.capitalize()}
            rows.append(row)
    types: Row = dict.fromkeys(("question_id", "question", "answer", "category"), "str") | {"image": "image"}
    return {"data/test-00000-of-00001.parquet": (types, rows)}


def _mmbench(source: _Source, n: int) -> Files:
    """Every question once per rotation of its options; rotation k has the index of the question plus k million.

    The Chinese files hold the same English questions: what the suite tests there is the Chinese instruction.
    """
    asked = [list(rotations) for rotations in _rotations(source, n)]
    longest = max(len(rotations) for rotations in asked)
    rows = [rotations[k] for k in range(longest) for rotations in asked if k < len(rotations)]
    types: Row = dict.fromkeys(rows[0], "str") | {"index": "int", "image": "image"}
    return {f"{language}/dev-00000-of-00001.parquet": (types, rows) for language in ("en", "cn")}


def _rotations(source: _Source, n: int) -> Iterator[list[Row]]:
    rows = 0
    for index, (_, picture, question) in enumerate(source.ask("mmbench", n, per_scene=1)):
        choices, right = list(question.choices or ()), question.answer_index or 0
        group = []
        for k in range(len(choices)):
            turned = choices[k:] + choices[:k]
            row: Row = {
                "index": index + k * 1_000_000,
                "question": question.text,
                "hint": question.meta.get("hint") or None,
            }
            row |= {"answer": _LETTERS[(right - k) % len(choices)], "image": picture, "source": "mini", "split": "dev"}
            row |= {letter: turned[i] if i < len(turned) else None for i, letter in enumerate(_LETTERS)}
            row |= {"category": question.meta["category"], "L2-category": question.meta["l2_category"]}
            group.append(row | {"comment": None})
        yield group
        rows += len(group)
        if rows >= n:
            return


def _seedbench(source: _Source, n: int) -> Files:
    """Every tenth question is about a (still) video: several frames in the image column."""
    rows = []
    kinds: dict[str, int] = {}
    for i, (number, picture, question) in enumerate(source.ask("seedbench", n, per_scene=2)):
        video = i % 10 == 9
        row: Row = {"question": question.text, "question_id": str(i), "answer": question.answer}
        row |= {f"choice_{letter}": choice for letter, choice in zip("abcd", question.choices or ())}
        row |= {"data_id": f"{'video' if video else 'image'}_{number}", "data_type": "video" if video else "image"}
        row["question_type_id"] = kinds.setdefault(question.meta["question_type"], len(kinds) + 1)
        row |= {"segment": ["0.0", "1.0"] if video else [], "image": [picture] * (_VIDEO_FRAMES if video else 1)}
        rows.append(row)
    types: Row = dict.fromkeys(rows[0], "str") | {"question_type_id": "int", "segment": ["str"], "image": ["image"]}
    return {"data/test-00000-of-00001.parquet": (types, rows)}


def _mmvet(source: _Source, n: int) -> Files:
    rows = []
    for i, (_, picture, question) in enumerate(source.ask("mmvet", n, per_scene=1)):
        row: Row = {"question_id": f"v1_{i}", "image": picture, "question": question.text, "image_source": "mini"}
        rows.append(
            row | {"answer": "<AND>".join(question.meta["key_phrases"]), "capability": question.meta["capability"]}
        )
    types: Row = dict.fromkeys(rows[0], "str") | {"image": "image"}
    return {"data/test-00000-of-00001.parquet": (types, rows)}


#: Dataset repository (without owner) -> writer. The order is part of the seeds: add new ones at the end.
WRITERS: dict[str, Callable[[_Source, int], Files]] = {
    "VQAv2": _vqav2,
    "GQA": _gqa,
    "VizWiz-VQA": _vizwiz,
    "ScienceQA": _scienceqa,
    "textvqa": _textvqa,
    "POPE": _pope,
    "MME": _mme,
    "MMBench": _mmbench,
    "SEED-Bench": _seedbench,
    "MMVet": _mmvet,
}
