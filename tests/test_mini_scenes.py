"""The mini suite's scenes and questions: deterministic, disjoint, true, and not guessable without the image."""

import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from corematching.benchmarks.mini.drawing import DISTRACTOR, digit_drawings, ground_of, render
from corematching.benchmarks.mini.families import FAMILIES, MME_SUBTASKS, POOLS
from corematching.benchmarks.mini.questions import BENCHMARK_FAMILIES, UNANSWERABLE, questions_for
from corematching.benchmarks.mini.scenes import COLOURS, GRID, IMAGE_SIZE, PATCH, make_scene

SCENES = [make_scene(seed, "test") for seed in range(300)]


def asked(benchmark, scenes=SCENES):
    rng = random.Random(7)
    return [(scene, question) for scene in scenes for question in questions_for(benchmark, scene, rng)]


def test_equal_seeds_draw_equal_pixels_and_splits_differ():
    first, again = (np.asarray(render(make_scene(3, "test"))) for _ in range(2))
    assert first.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert (first == again).all()
    assert make_scene(3, "train") != make_scene(3, "test")
    train = {make_scene(seed, "train").objects for seed in range(300)}
    assert train.isdisjoint(scene.objects for scene in SCENES)


def test_handwritten_digits_are_split_too():
    train, test = (
        {drawing.tobytes() for kind in digit_drawings(split) for drawing in kind} for split in ("train", "test")
    )
    assert len(train) > 3 * len(test) > 900
    assert train.isdisjoint(test)


def test_unknown_names_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"unknown split 'val': use one of train, test"):
        make_scene(0, "val")
    with pytest.raises(ValueError, match=r"unknown mini benchmark 'coco': use one of vqav2, gqa"):
        questions_for("coco", SCENES[0], random.Random(0))


def test_objects_have_their_own_colours_and_all_things_keep_apart():
    for scene in SCENES:
        assert 4 <= len(scene.objects) <= 7
        assert len({item.colour for item in scene.objects}) == len(scene.objects)
        taken = [(item.col, item.row, item.width, item.height) for item in scene.objects]
        taken += [(item.col, item.row, item.side, item.side) for item in scene.distractors]
        for i, (col, row, width, height) in enumerate(taken):
            assert 0 <= col <= GRID - width
            assert 0 <= row <= GRID - height
            for other_col, other_row, other_width, other_height in taken[:i]:
                assert (
                    col + width < other_col
                    or other_col + other_width < col
                    or row + height < other_row
                    or other_row + other_height < row
                )


def test_objects_are_one_to_six_patches_wide_and_distractors_common():
    assert {item.width for scene in SCENES for item in scene.objects} == set(range(1, 7))
    assert all(2 <= len(scene.distractors) <= 6 for scene in SCENES[:50])
    for scene in SCENES:
        assert not {item.colour for item in scene.distractors} & set(COLOURS)


def test_backgrounds_vary_within_and_between_images():
    looks = [ground_of(scene)[1] for scene in SCENES[:60]]
    assert {int(look) for one in looks for look in np.unique(one)} == set(range(DISTRACTOR + 1))
    backgrounds = [one[one < DISTRACTOR] for one in looks]
    assert np.mean([len(np.unique(one)) > 1 for one in backgrounds]) > 0.4
    tints = np.array([ground_of(scene)[0].mean((0, 1)) for scene in SCENES[:60]])
    assert tints.std(0).min() > 10


def test_an_object_is_drawn_in_its_colour_inside_its_box():
    scene = next(
        scene for scene in SCENES if any(item.kind == "square" and item.texture == "plain" for item in scene.objects)
    )
    item = next(item for item in scene.objects if item.kind == "square" and item.texture == "plain")
    x, y = (int(value * PATCH) for value in item.centre)
    pixel = np.asarray(render(scene)).astype(int)[y, x]
    assert abs(pixel - COLOURS[item.colour]).max() < 30


@pytest.mark.parametrize("benchmark", BENCHMARK_FAMILIES)
def test_questions_are_deterministic_and_their_boxes_hold_objects(benchmark):
    assert asked(benchmark) == asked(benchmark)
    for scene, question in asked(benchmark):
        assert set(question.boxes) <= {item.box for item in scene.objects}
        if question.choices:
            assert question.answer == "ABCD"[question.answer_index]
            assert question.choices[question.answer_index] == question.meta["word"]
            assert len(set(question.choices)) == len(question.choices)


def test_open_answers_are_what_the_scene_shows():
    attributes = {
        "color": "colour",
        "shape": "kind",
        "digit": "kind",
        "word": "kind",
        "texture": "texture",
        "size": "size",
    }
    for scene, question in asked("gqa"):
        if question.family in attributes:
            (item,) = (item for item in scene.objects if item.box == question.boxes[0])
            assert question.answer == getattr(item, attributes[question.family])
            assert question.answer in POOLS[question.family]
        if question.family == "exists":
            colour, kind = question.text.split()[3:5]
            there = any(item.colour == colour and item.kind == kind for item in scene.objects)
            assert question.answer == ("yes" if there else "no")


def test_unanswerable_questions_ask_about_absent_things():
    questions = asked("vizwiz")
    share = np.mean([question.answer == UNANSWERABLE for _, question in questions])
    assert 0.2 < share < 0.45
    for scene, question in questions:
        words = question.text.rstrip("?").split()
        shown = any(item.colour in words or item.kind in words for item in scene.objects)
        assert shown == (question.answer != UNANSWERABLE)


def test_mme_asks_each_statement_truly_and_falsely():
    questions = [question for _, question in asked("mme")]
    assert {question.meta["subtask"] for question in questions} == set(MME_SUBTASKS)
    for true, false in zip(questions[::2], questions[1::2]):
        assert (true.answer, false.answer) == ("yes", "no")
        assert true.meta == false.meta
        assert true.text != false.text


@pytest.mark.parametrize(
    ("benchmark", "bound"),
    [("vqav2", 0.4), ("gqa", 0.3), ("vizwiz", 0.45), ("scienceqa", 0.55), ("textvqa", 0.2), ("pope", 0.5), ("mme", 0.5),
     ("mmbench", 0.3), ("seedbench", 0.3), ("mmvet", 0.2)],
)  # fmt: skip
def test_the_most_frequent_answer_is_a_poor_guess(benchmark, bound):
    by_answer = Counter(question.answer for _, question in asked(benchmark))
    assert by_answer.most_common(1)[0][1] <= (bound + 0.02) * by_answer.total()


def test_no_family_is_decided_by_its_majority_answer():
    allowed = {"count": 0.5, "texture": 0.45}
    counts = defaultdict(Counter)
    rng = random.Random(1)
    for family, ask in FAMILIES.items():
        for scene in SCENES:
            if question := ask(scene, rng):
                counts[family][question.answer] += 1
    for family, answers in counts.items():
        two_valued = len(answers) == 2
        limit = 0.58 if two_valued else allowed.get(family, 0.3)
        assert answers.most_common(1)[0][1] <= limit * answers.total(), family
