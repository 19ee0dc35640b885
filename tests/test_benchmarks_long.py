"""Long answers and long prompts: what a text names, what it should, and the road through lmms-eval."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from corematching.benchmarks import BENCHMARKS, available_benchmarks, load_benchmark, load_source
from corematching.benchmarks.content import Content, last_number, objects_named
from corematching.benchmarks.mini.long import IMAGES
from corematching.benchmarks.mini.writers import write_mini
from corematching.benchmarks.rows import load_rows
from corematching.benchmarks.scoring import score, value_from_samples
from corematching.errors import UserError

BUNDLED = ("describe_all", "count_steps", "many_images")
HUB = ("coco_chair", "muirbench")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a small striped red circle, and a blue sign that says cat.", [("red", "circle"), ("blue", "cat")]),
        ("Red circle; green 7: 2", [("red", "circle"), ("green", "7")]),
        ("a red blue square", [("blue", "square")]),
        ("circle red", []),
        ("red " + "very " * 9 + "round circle", []),
        ("red circle square", [("red", "circle")]),
        ("", []),
    ],
)
def test_colours_are_paired_with_the_next_kind(text, found):
    assert objects_named(text) == found


def test_precision_and_recall_count_repetitions():
    shown = [("red", "circle"), ("blue", "cat"), ("blue", "cat")]
    assert Content.of([("red", "circle"), ("red", "circle")], shown) == Content(0.5, 1 / 3)
    assert Content.of(shown, shown).f1 == 1
    assert Content.of([], shown) == Content(0, 0)
    assert Content.of([], []).f1 == 1
    assert Content.of(shown, []).precision == 0


def test_the_number_is_the_last_one_that_is_no_object():
    assert last_number("a red 7, a blue 3: 2") == "2"
    assert last_number("There are 4: a red 7") == "4"
    assert last_number("a red 7") is None


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("long")
    write_mini(root, 6, 0, [load_benchmark(name).folder for name in (*BUNDLED, *HUB)])
    return root


def rows_of(suite: Path, name: str) -> list[dict]:
    return pq.read_table(suite / load_benchmark(name).folder / "data/test-00000-of-00001.parquet").to_pylist()


def test_right_answers_name_what_is_there(suite):
    for name in BUNDLED:
        for row in rows_of(suite, name):
            named = objects_named(row["answer"])
            assert Content.of(named, named).f1 == 1
            assert len(named) == len([part for part in row["answer"].split(":")[0].split(";") if part.strip()])
    assert all(
        last_number(row["answer"]) == row["answer"].split(":")[1].strip() for row in rows_of(suite, "count_steps")
    )
    assert all(5 <= len(objects_named(row["answer"])) <= 7 for row in rows_of(suite, "describe_all"))
    pictures = [len(row["image"]) for row in rows_of(suite, "many_images")]
    assert pictures == list(IMAGES[: len(pictures)])


def test_the_ten_keep_their_scenes(tmp_path, suite):
    """The datasets beyond them draw scenes from elsewhere, whatever the seed."""
    write_mini(tmp_path, 4, 3, ["POPE"])
    content = json.loads((tmp_path / "POPE" / "manifest.json").read_text())["content"]
    assert content.startswith("6eb82ccc6423"), content
    assert set(BUNDLED + HUB) & set(BENCHMARKS) == set()
    assert set(BUNDLED + HUB) < set(available_benchmarks())


@pytest.mark.parametrize("name", [*BUNDLED, *HUB])
def test_files_are_as_the_benchmark_says(suite, name, tmp_path, monkeypatch):
    monkeypatch.setenv("CM_CACHE", str(tmp_path))
    benchmark = load_benchmark(name)
    assert len(load_rows(benchmark, benchmark.parts[0], suite / benchmark.folder)) == (
        2 if name == "many_images" else 6
    )


def test_bundled_benchmarks_are_refused_on_the_hub():
    with pytest.raises(UserError, match=r"describe_all is part of the mini suite alone.*data=mini"):
        load_source("hub").root(load_benchmark("describe_all"))


# ------------------------------------------------------------------------------------------------- through lmms-eval
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every long benchmark answered by a model that names half of what is there, or the right letter."""
    from test_benchmarks_tasks import answering, evaluate

    from corematching.benchmarks import tasks

    def answer(doc):
        if "gt_object" in doc:
            return f"A {doc['gt_object'][0]} and a zebra."
        if "options" in doc:
            return doc["answer"] if doc["idx"] % 2 else "I cannot tell"
        parts = [part for part in doc["answer"].split(":")[0].split("; ") if part]
        return "; ".join(parts[: max(1, len(parts) // 2)]) + ": 2"

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(tasks, "_check_nltk", lambda: None)
        source, built = load_source("mini", n=6), []
        for name in (*BUNDLED, *HUB):
            built += tasks.build_tasks(load_benchmark(name), source)
        stock = tasks.stock_config(load_benchmark("coco_chair").parts[0])["process_results"].__globals__
        built_globals = [
            task.config.process_results.__globals__ for task in built if task.config.task == "coco_cap_chair"
        ]
        for scope in (stock, *built_globals):  # NLTK's data are not here
            patch.setitem(scope, "caption_to_words", lambda text: ([], text.rstrip(".").lower().split(), [], []))
        return evaluate(answering(answer), built, tmp_path_factory.mktemp("output"))


@pytest.mark.parametrize("name", BUNDLED)
def test_content_is_scored_through_lmms_eval(runs, name):
    benchmark = load_benchmark(name)
    found = score(benchmark, runs)
    assert found.status == "scored"
    assert found.metrics["precision"] > found.metrics["recall"] > 20
    assert found.value == pytest.approx(found.metrics[f"lmms_eval/{name}/content"])
    assert value_from_samples(benchmark, found.samples)[0] == pytest.approx(found.value)
    assert ("count" in found.metrics) == (name == "count_steps")


def test_chair_and_muirbench_follow_the_stock_tasks(runs):
    chair = score(load_benchmark("coco_chair"), runs)
    # "a", "and", "a", "zebra" are said besides one object that is there.
    assert chair.metrics["lmms_eval/coco_cap_chair/coco_cap_chair_i"] == pytest.approx(80)
    assert 0 < chair.metrics["precision"] <= 100 / 3
    assert chair.metrics["recall"] == pytest.approx(chair.metrics["lmms_eval/coco_cap_chair/coco_cap_recall"], abs=20)
    muir = score(load_benchmark("muirbench"), runs)
    assert muir.value == pytest.approx(50)
    assert muir.metrics["Image-Text Matching"] == pytest.approx(50)


def test_missing_nltk_data_are_told_before_the_run(tmp_path, monkeypatch):
    import nltk

    from corematching.benchmarks import tasks

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setenv("CM_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"python -m nltk.downloader punkt_tab"):
        tasks.build_tasks(load_benchmark("coco_chair"), load_source("mini", n=2))
