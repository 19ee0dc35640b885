"""The papers' numbers, against sums done by hand."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pytest

from corematching.benchmarks import load_benchmark
from corematching.benchmarks.scoring import score, value_from_samples
from corematching.benchmarks.spec import ROW
from corematching.errors import UserError
from corematching.results.table import build_table


def test_benchmarks_are_light_to_import() -> None:
    """The command line tells wrong input within a second; none of these would let it."""
    heavy = "{'torch', 'transformers', 'datasets', 'pandas', 'lmms_eval', 'huggingface_hub'}"
    code = f"import sys, corematching.benchmarks; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def table(rows: list[tuple], *columns: str) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(columns))


def test_exact_match_is_the_mean_in_percent() -> None:
    samples = table([(1.0,), (0.3,), (0.0,), (0.9,)], "score")
    assert value_from_samples(load_benchmark("textvqa"), samples)[0] == pytest.approx(55.0)


def test_mme_adds_accuracy_and_pairs_per_subtask() -> None:
    samples = table(
        [
            ("color", "a", 1.0),
            ("color", "a", 1.0),
            ("color", "b", 1.0),
            ("color", "b", 0.0),
            ("code_reasoning", "a", 0.0),
            ("code_reasoning", "a", 1.0),
        ],
        "part",
        "unit",
        "score",
    )
    value, metrics = value_from_samples(load_benchmark("mme"), samples)
    assert metrics["color"] == pytest.approx(75 + 50)
    assert metrics["cognition"] == pytest.approx(50 + 0)
    assert metrics["perception"] == pytest.approx(125)
    assert metrics["total"] == pytest.approx(175)
    assert value == pytest.approx(125), "the quoted number is perception, at most 2000"
    only = value_from_samples(load_benchmark("mme"), samples[samples["part"] == "code_reasoning"])
    assert (only[0], only[1]["cognition"]) == (None, 50.0)


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("B", True),
        ("B. blue", True),
        ("The answer is B.", True),
        ("It is blue. The answer is B", True),
        ("The answer is A.", False),
        ("The answer is Blue.", False),
        ("The answer is B. The answer is C.", False),
        ("B or not", False),
        ("A. The answer is B.", False),
    ],
)
def test_scienceqa_takes_the_letter_in_a_sentence_too(said: str, right: bool) -> None:
    stock = float(said.strip().lower() == "b" or said[:2] == "B.")  # lmms-eval's rule
    sample = {"doc": {ROW: 0, "question": "?", "subject": "x"}, "arguments": ["?"], "exact_match": stock}
    sample |= {"filtered_resps": [said], "target": "B"}
    results = {"samples": {"scienceqa_img": [sample]}, "results": {"scienceqa_img": {"exact_match,none": stock}}}
    found = score(load_benchmark("scienceqa"), results)
    assert found.value == 100.0 * right
    assert found.metrics["lmms_eval/scienceqa_img/exact_match"] == stock, "the stock number stands beside it"


def test_pope_counts_an_unreadable_answer_as_a_miss() -> None:
    """Stock leaves it out of recall, which then is 1 although one of two was missed."""
    rows = [
        ("random", "yes", "yes", 1.0),
        ("random", "yes.", "yes", 0.0),
        ("random", "no", "no", 1.0),
        ("random", "yes", "no", 0.0),
        ("popular", " YES", "yes", 1.0),
        ("popular", "no", "no", 1.0),
    ]
    value, metrics = value_from_samples(load_benchmark("pope"), table(rows, "part", "prediction", "target", "score"))
    precision, recall = 1 / 2, 1 / 2
    assert metrics["f1_random"] == pytest.approx(100 * 2 * precision * recall / (precision + recall))
    assert metrics["f1_popular"] == pytest.approx(100)
    assert value == pytest.approx(75)
    assert metrics["yes_ratio"] == pytest.approx(50)
    assert metrics["invalid"] == pytest.approx(100 / 6)


def test_pope_that_never_says_yes_is_zero() -> None:
    rows = [("random", "no", "yes", 0.0), ("random", "no", "no", 1.0)]
    value, metrics = value_from_samples(load_benchmark("pope"), table(rows, "part", "prediction", "target", "score"))
    assert (value, metrics["accuracy"]) == (0.0, 50.0)


def test_mmbench_needs_every_rotation() -> None:
    rows = [("1", "x", 1.0), ("1", "x", 1.0), ("2", "x", 1.0), ("2", "x", 0.0), ("3", "y", 1.0)]
    value, metrics = value_from_samples(load_benchmark("mmbench"), table(rows, "unit", "part", "score"))
    assert value == pytest.approx(200 / 3)
    assert metrics == {"single_rotation": pytest.approx(80), "x": pytest.approx(50), "y": pytest.approx(100)}


def test_seedbench_keeps_images_and_videos_apart() -> None:
    value, metrics = value_from_samples(
        load_benchmark("seedbench"), table([("image", 1.0), ("image", 0.0), ("video", 1.0)], "part", "score")
    )
    assert value == pytest.approx(200 / 3)
    assert metrics == {"image": 50.0, "video": 100.0}


def test_mmvet_counts_a_question_for_each_capability_it_needs() -> None:
    value, metrics = value_from_samples(
        load_benchmark("mmvet"), table([("ocr,math", 1.0), ("ocr", 0.5), ("rec", 0.0)], "part", "score")
    )
    assert value == pytest.approx(50)
    assert metrics == {"math": 100.0, "ocr": 75.0, "rec": 0.0}


@pytest.mark.parametrize("name", ["gqa", "mme", "mmvet", "vqav2_test"])
def test_one_missing_score_means_no_number(name: str) -> None:
    samples = table([("a", "a", 1.0), ("a", "a", float("nan"))], "part", "unit", "score")
    assert value_from_samples(load_benchmark(name), samples) == (None, {})


def test_run_table_says_who_graded() -> None:
    def record(method: str, benchmark: str, note: str) -> dict:
        score = {"metric": "score", "value": 50.0, "scale": 100.0, "note": note}
        labels = {"method": method, "keep": None, "benchmark": benchmark}
        return {"status": "done", "score": score, "labels": labels, "config": {"method": {"name": method}}}

    records = [record(method, "mmvet", "graded by the local judge") for method in ("dense", "fastv")]
    records += [record("dense", "gqa", "")]
    assert build_table(records, ["mmvet", "gqa"], []).notes == ("mmvet: graded by the local judge",)


def test_results_without_samples_are_refused() -> None:
    with pytest.raises(UserError, match="pope: the results hold no samples of task pope_adv"):
        score(load_benchmark("pope"), {"results": {}, "samples": {}})
