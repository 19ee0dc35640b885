"""The ten benchmarks through lmms-eval: same prompts, same scores as its stock tasks, and its traps closed."""

from __future__ import annotations

import argparse
import importlib.util
import random
import time
from pathlib import Path
from typing import Any

import pytest
from loguru import logger
from stock_judge import stock_judge

from corematching.benchmarks import BENCHMARKS, available_benchmarks, load_benchmark, load_judge, load_source
from corematching.benchmarks.scoring import score, value_from_samples
from corematching.benchmarks.spec import MME_COGNITION, ROW
from corematching.errors import UserError

GOLDENS = Path(__file__).parent / "goldens" / "prompts"
LETTERED = ("scienceqa", "mmbench", "mmbench_cn", "seedbench")
N = 30

#: One hand-written row per benchmark; its rendered prompts are the golden files.
ROWS: dict[str, dict[str, Any]] = {
    "vqav2": {"question": "Where is he looking?"},
    "gqa": {"question": "Is it overcast?", "imageId": "n1"},
    "vizwiz": {"question": "what is the name of the DVD? Thanks."},
    "scienceqa": {
        "hint": "The figure shows a map.",
        "question": "Which is farthest north?",
        "choices": ["Ohio", "Iowa"],
    },
    "textvqa": {"question": "what is the brand of this Camera?", "ocr_tokens": ["DAKOTA", "DIGITAL"]},
    "pope": {"question": "Is there a snowboard in the image?"},
    "mme": {"question": "Is this a Python program? Please answer yes or no."},
    "mmbench": {
        "index": 7,
        "hint": "The passage is about cats.",
        "question": "Which one is right?",
        "answer": "B",
        "A": "a dog",
        "B": "a cat",
        "C": None,
        "D": None,
        "category": "logic",
        "L2-category": "reasoning",
        "source": "mini",
        "split": "dev",
    },
    "seedbench": {
        "question": "How many towels are there?",
        "choice_a": "One",
        "choice_b": "Two",
        "choice_c": "Three",
        "choice_d": "Four",
    },
    "mmvet": {"question": "What is x in the equation?"},
}
ROWS["mmbench_cn"] = ROWS["mmbench"] | {"hint": None, "question": "哪一个是正确的?"}
ROWS["vqav2_test"] = ROWS["vqav2"]
ROWS["textvqa_no_ocr"] = ROWS["textvqa"]
ROWS |= {name: {"question": "Describe all objects."} for name in ("describe_all", "count_steps", "many_images")}
ROWS["coco_chair"] = {"question_id": "42"}
ROWS["muirbench"] = {"question": "Which image shows a red circle?", "options": ["Image 1", "Image 2"]}


@pytest.fixture(scope="module")
def harness():
    """Our modules that import lmms-eval, imported once; `log` is a sink that was there before."""
    log: list[str] = []
    sink = logger.add(log.append, level="INFO")
    from corematching.benchmarks import tasks

    with pytest.MonkeyPatch.context() as patch:
        yield argparse.Namespace(tasks=tasks, patch=patch, log=log)
    logger.remove(sink)


@pytest.fixture(scope="module")
def source(harness, tmp_path_factory: pytest.TempPathFactory):
    harness.patch.setenv("CM_CACHE", str(tmp_path_factory.mktemp("cache")))
    return load_source("mini", n=N)


@pytest.fixture(scope="module")
def judge():
    judge = load_judge("local")
    yield judge
    judge.close()


def answering(answer):
    """An lmms-eval model that answers ``answer(row)``."""
    from lmms_eval.api.model import lmms as Model

    class Answering(Model):
        is_simple = True

        def __init__(self) -> None:
            super().__init__()
            self.generation: list[dict] = []

        def generate_until(self, requests: list) -> list[str]:
            texts = []
            for request in requests:
                _, generation, to_images, row, task, split = request.args
                doc = self.task_dict[task][split][row]
                assert all(image.size == (336, 336) for image in to_images(doc))
                self.generation.append(generation)
                texts.append(answer(doc))
            return texts

        def loglikelihood(self, requests: list) -> list:
            raise NotImplementedError

        def generate_until_multi_round(self, requests: list) -> list:
            raise NotImplementedError

        def clean(self) -> None:
            pass

    return Answering()


def evaluate(model, tasks: list, output: Path) -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    return simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False, include_path=[]),
        bootstrap_iters=0,
        cli_args=argparse.Namespace(process_with_media=False, output_path=str(output), reasoning_tags=None),
    )


def sometimes_right(doc: dict[str, Any]) -> str:
    """The right answer for about two rows in three; else a wrong, a sloppy or a useless one. Same for equal rows."""
    draw = random.Random(repr(sorted((key, doc[key]) for key in doc if key not in ("image", ROW, "answers"))))
    if doc.get("answers"):
        right = doc["answers"][0]["answer"] if isinstance(doc["answers"][0], dict) else doc["answers"][0]
    elif "choices" in doc:
        right = "ABCDE"[doc["answer"]]
    else:
        right = doc.get("answer", "a cat").replace("<AND>", " and ")
    wrong = {"yes": "no", "no": "yes", "Yes": "No", "No": "Yes", "A": "B"}.get(right, "A")
    return draw.choice([right, right, right, right, wrong, f"{right}.", "I cannot tell"])


# --- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", available_benchmarks())
def test_prompts_equal_their_snapshots(harness, source, name: str) -> None:
    benchmark = load_benchmark(name)
    shown = []
    harness.patch.setattr(harness.tasks, "_check_nltk", lambda: None)
    for mode in benchmark.prompts:
        task = harness.tasks.build_tasks(benchmark, source, mode, limit=2)[0]
        shown.append(f"=== {mode}\n{task.doc_to_text(dict(ROWS[name]))}\n")
    golden = GOLDENS / f"{name}.txt"
    assert "".join(shown) == golden.read_text(encoding="utf-8"), f"prompt changed; if intended, update {golden.name}"


def test_llava15_decodes_greedily_and_lmms_eval_keeps_its_settings(harness, source) -> None:
    for name in BENCHMARKS:
        benchmark = load_benchmark(name)
        ours, stock = (
            harness.tasks.build_tasks(benchmark, source, mode, limit=2)[0] for mode in ("llava15", "lmms_eval")
        )
        settings = ours.config.generation_kwargs
        assert settings["do_sample"] is False
        assert settings["until"] == []
        assert settings["max_new_tokens"] == benchmark.prompt("llava15").max_new_tokens
        expected = dict(harness.tasks.stock_config(benchmark.parts[0])["generation_kwargs"])
        assert expected.items() <= stock.config.generation_kwargs.items()
    capped = harness.tasks.build_tasks(load_benchmark("mmvet"), source, "llava15", limit=2, max_new_tokens=20)[0]
    assert capped.config.generation_kwargs["max_new_tokens"] == 20


def test_seedbench_shows_the_middle_frame(harness, source) -> None:
    benchmark = load_benchmark("seedbench")
    for mode, frames in (("llava15", 1), ("lmms_eval", 3)):
        task = harness.tasks.build_tasks(benchmark, source, mode)[0]
        row = list(task.dataset["test"]["data_type"]).index("video")
        assert len(task.doc_to_visual(task.dataset["test"][row])) == frames


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(harness, source, judge, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """All benchmarks in stock wording, answered the same: lmms-eval's stock tasks, and ours."""
    output = tmp_path_factory.mktemp("output")
    ours, stock = [], []
    with pytest.MonkeyPatch.context() as patch, stock_judge() as url:
        patch.setenv("OPENAI_API_KEY", "unused")
        patch.setenv("no_proxy", "127.0.0.1")
        for name in (*BENCHMARKS, "vqav2_test"):
            benchmark = load_benchmark(name)
            ours += harness.tasks.build_tasks(benchmark, source, "lmms_eval", judge=judge)
            patch.setenv("OPENAI_API_URL", url)
            stock += [stock_task(benchmark, part, source) for part in benchmark.parts]
        return {
            "stock": evaluate(answering(sometimes_right), stock, output),
            "ours": evaluate(answering(sometimes_right), ours, output),
        }


def stock_task(benchmark, part, source):
    """lmms-eval's own task on the same files; only where the files lie is changed."""
    import datasets
    from lmms_eval import tasks as stock
    from lmms_eval.api.task import ConfigurableTask

    root = source.root(benchmark)
    folder = Path(stock.__file__).parent / part.tasks_dir
    config = dict(stock.TaskManager(include_defaults=False, include_path=[str(folder)])._get_config(part.task))
    files = {part.split: [str(file) for file in root.glob(part.files)]}
    config.update(dataset_path="parquet", dataset_name=None, dataset_kwargs={"data_files": files})
    config["dataset_kwargs"]["cache_dir"] = str(root.parent / "stock")
    if benchmark.images is not None:
        images = datasets.Dataset.from_parquet([str(file) for file in root.glob(benchmark.images.files)])
        by_id = {row["id"]: row["image"] for row in images}
        config["process_docs"] = lambda rows: rows.map(lambda row: {"image": by_id[row["imageId"]]})
    return ConfigurableTask(config=config)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_scores_equal_the_stock_tasks(runs, name: str) -> None:
    for part in load_benchmark(name).parts:
        ours, stock = runs["ours"]["results"][part.task], runs["stock"]["results"][part.task]
        keys = [
            key
            for key, value in ours.items()
            if key.endswith(",none") and isinstance(value, float) and "stderr" not in key
        ]
        assert keys
        for key in keys:
            assert ours[key] == pytest.approx(stock[key], abs=1e-12), key


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompts_given_equal_the_stock_tasks(runs, name: str) -> None:
    for part in load_benchmark(name).parts:
        ours, stock = runs["ours"]["samples"][part.task], runs["stock"]["samples"][part.task]
        assert [row["arguments"][0] for row in ours] == [row["arguments"][0] for row in stock]


def stock_value(name: str, results: dict[str, Any]) -> float:
    """The quoted number, from stock aggregates alone."""
    values = {part.task: results[part.task] for part in load_benchmark(name).parts}
    first = next(iter(values.values()))
    match name:
        case "mme":
            return first["mme_perception_score,none"]
        case "mmbench" | "mmvet":
            return first["gpt_eval_score,none"]
        case "seedbench":
            return 100 * first["seed_all,none"]
    return 100 * first["exact_match,none"]


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "pope"])
def test_quoted_number_follows_from_stock_aggregates(runs, name: str) -> None:
    result = score(load_benchmark(name), runs["ours"])
    assert result.status == "scored"
    assert result.value == pytest.approx(stock_value(name, runs["stock"]["results"]))
    assert 0 < result.value < result.scale
    assert value_from_samples(load_benchmark(name), result.samples)[0] == result.value


def test_samples_table(runs) -> None:
    columns = ["doc_id", "part", "unit", "question_id", "question", "prompt", "prediction", "target", "score"]
    for name in BENCHMARKS:
        table = score(load_benchmark(name), runs["ours"]).samples
        assert list(table.columns) == columns
        assert table["doc_id"].is_unique
        assert table["score"].between(0, 1).all()
        assert (table["target"] != "answer").all()
    mme = score(load_benchmark("mme"), runs["ours"]).samples
    assert (mme.groupby("unit").size() == 2).all()


def test_test_split_is_not_scored_and_keeps_its_answers(runs) -> None:
    result = score(load_benchmark("vqav2_test"), runs["ours"])
    assert (result.status, result.value) == ("not_scored", None)
    assert "EvalAI" in result.note
    assert result.samples["submission"].str.len().gt(0).all()


# --- traps -----------------------------------------------------------------------------------------------------------


def test_pope_counts_what_was_said(harness, source, tmp_path: Path) -> None:
    benchmark = load_benchmark("pope")
    tasks = harness.tasks.build_tasks(benchmark, source, limit=12)
    result = score(benchmark, evaluate(answering(lambda doc: "yes"), tasks, tmp_path))
    assert result.metrics["yes_ratio"] == 100.0
    assert result.metrics["lmms_eval/pope_adv/pope_yes_ratio"] == 0.5, "stock looks at the truth instead"
    assert result.value == pytest.approx(100 * 2 / 3)
    result = score(benchmark, evaluate(answering(lambda doc: "Yes."), tasks, tmp_path))
    assert (result.value, result.metrics["invalid"]) == (0.0, 100.0)
    assert result.note == "12 of 12 answers were neither yes nor no and count as wrong"


@pytest.mark.parametrize("limit", [1, 3, 29])
def test_mme_limit_never_splits_a_pair(harness, source, tmp_path: Path, limit: int) -> None:
    benchmark = load_benchmark("mme")
    tasks = harness.tasks.build_tasks(benchmark, source, limit=limit)
    result = score(benchmark, evaluate(answering(lambda doc: doc["answer"]), tasks, tmp_path))
    assert len(result.samples) == limit + 1
    assert result.metrics["total"] == 200.0 * result.samples["part"].nunique()
    perception = result.samples["part"][~result.samples["part"].isin(MME_COGNITION)].nunique()
    assert result.value == 200.0 * perception
    assert (f"{10 - perception} of 10 perception subtasks" in result.note) == (perception < 10)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "all"])
def test_bad_limit_is_refused(harness, source, limit) -> None:
    with pytest.raises(UserError, match=r"^limit=.* is not usable"):
        harness.tasks.build_tasks(load_benchmark("gqa"), source, limit=limit)


def test_limit_is_shared_by_the_subsets(harness, source) -> None:
    tasks = harness.tasks.build_tasks(load_benchmark("pope"), source, limit=8)
    assert [len(task.eval_docs) for task in tasks] == [3, 3, 2]


def test_mmbench_never_guesses_and_never_calls_out(harness, source, tmp_path: Path, monkeypatch) -> None:
    import requests

    monkeypatch.setattr(requests, "post", lambda *a, **k: pytest.fail("MMBench asked a server"))
    benchmark = load_benchmark("mmbench")
    tasks = harness.tasks.build_tasks(benchmark, source)
    start = time.monotonic()
    result = score(benchmark, evaluate(answering(lambda doc: "no idea whatsoever"), tasks, tmp_path))
    assert result.value == 0.0
    assert time.monotonic() - start < 10


def test_mmbench_ignores_absent_options(harness, source) -> None:
    task = harness.tasks.build_tasks(load_benchmark("mmbench"), source, limit=4)[0]
    row = ROWS["mmbench"] | {"C": "nan", "D": "nan", ROW: 0}
    assert task.process_results(row, ["a cat on a banana"])["gpt_eval_score"]["correct"] == 1


def test_scoring_failure_surfaces_at_once_with_its_row(harness, source) -> None:
    task = harness.tasks.build_tasks(load_benchmark("pope"), source, limit=6)[0]
    start = time.monotonic()
    with pytest.raises(UserError, match=r"split adversarial, row 5: scoring failed with AssertionError"):
        task.process_results({"answer": "maybe", "question_id": "1", ROW: 5}, ["yes"])
    assert time.monotonic() - start < 1, "stock waits two seconds before each of four more attempts"


def test_gqa_question_without_image_is_told(harness, source, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(harness.tasks, "load_images", lambda *a: (None, {"n000000": 0}))
    with pytest.raises(UserError, match=r"split testdev, row \d+, column imageId: there is no image 'n00000\d'"):
        harness.tasks.build_tasks(load_benchmark("gqa"), source)


def test_host_log_sinks_survive(harness) -> None:
    logger.info("still here")
    assert any("still here" in line for line in harness.log)


def test_truncated_images_stay_an_error(harness) -> None:
    """lmms-eval's import makes PIL accept them process-wide, as grey."""
    from PIL import ImageFile

    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_environment_is_left_alone(harness, source, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.delenv("OPENAI_API_URL", raising=False)
    before = dict(os.environ)
    (task,) = harness.tasks.build_tasks(load_benchmark("mmvet"), source, limit=2)
    assert dict(os.environ) == before
    for name in ("mmvet", "mmbench"):
        stock = harness.tasks.stock_config(load_benchmark(name).parts[0])["process_results"].__globals__
        held = {**stock, **vars(stock.get("server") or stock["mmbench_evaluator"])}
        assert "sk-very-secret" not in repr(held)
    assert "sk-very-secret" not in repr(task.dump_config())


def test_building_and_overhead_are_measured(harness, source) -> None:
    """The measuring script runs, and building the ten tasks stays far below its limit."""
    spec = importlib.util.spec_from_file_location(
        "bench", Path(__file__).parent.parent / "scripts" / "bench_harness.py"
    )
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    numbers = bench.measure(N)
    assert set(numbers["benchmarks"]) == set(BENCHMARKS)
    assert all(row["questions"] >= N for row in numbers["benchmarks"].values())
    assert numbers["overhead_ms"] > 0
    assert numbers["build_s"] < bench.BUILD_LIMIT


# --- judge -----------------------------------------------------------------------------------------------------------


def test_mmvet_without_judge_is_not_scored(harness, source, tmp_path: Path) -> None:
    benchmark = load_benchmark("mmvet")
    tasks = harness.tasks.build_tasks(benchmark, source, limit=5)
    result = score(benchmark, evaluate(answering(sometimes_right), tasks, tmp_path))
    assert (result.status, result.value) == ("not_scored", None)
    assert result.note == "5 of 5 answers not graded: no judge"
    assert result.samples["prediction"].str.len().gt(0).all()
    assert result.samples["score"].isna().all()


def test_mmvet_with_a_judge_that_answers_five_is_not_scored(harness, source, tmp_path: Path, monkeypatch) -> None:
    from test_benchmarks_judge import Endpoint, openai_judge

    endpoint = Endpoint("5")
    try:
        judge = openai_judge(endpoint.url, monkeypatch)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        benchmark = load_benchmark("mmvet")
        start = time.monotonic()
        tasks = harness.tasks.build_tasks(benchmark, source, limit=5, judge=judge)
        result = score(benchmark, evaluate(answering(sometimes_right), tasks, tmp_path))
        assert (result.status, result.value) == ("not_scored", None)
        assert result.note == "5 of 5 answers not graded: judge answered 5, which is not between 0 and 1"
        assert time.monotonic() - start < 20
    finally:
        endpoint.close()


def test_mmvet_says_which_judge_graded(runs) -> None:
    assert "key-phrase match" in score(load_benchmark("mmvet"), runs["ours"]).note
