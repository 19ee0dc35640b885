"""scripts/score.py: saved answers get their score later, without the model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
from synthetic_store import cell_config, cell_record, trace_summary

from corematching.results.store import Store

SCRIPT = Path(__file__).parent.parent / "scripts" / "score.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("score_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cell(store: Store, benchmark: str, samples: pd.DataFrame) -> None:
    record = cell_record(cell_config("dense", None, benchmark, len(samples)), status="not_scored", n=len(samples))
    store.write({**record, "trace": trace_summary(None)}, samples)


@pytest.fixture
def answers() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "doc_id": [0, 1, 2],
            "part": ["ocr", "spat", "ocr"],
            "question": ["What does the sign say?", "Where is it?", "What number is it?"],
            "target": ["dog", "top<AND>left", "7"],
            "prediction": ["It says the word dog", "It is at the top right", "8"],
            "score": [float("nan")] * 3,
        }
    )


def test_local_judge_scores_saved_answers(script, tmp_path: Path, answers: pd.DataFrame, capsys) -> None:
    store = Store(tmp_path)
    cell(store, "mmvet", answers)
    assert script.main([str(tmp_path)]) == 1
    assert "needs --judge" in capsys.readouterr().out
    assert script.main([str(tmp_path), "--judge", "local"]) == 0
    (record,) = store.records()
    assert record["status"] == "done"
    assert record["score"]["value"] == pytest.approx(50.0)
    assert "key-phrase match" in record["score"]["note"]
    assert record["metrics"] == {"ocr": 50.0, "spat": 50.0}
    assert list(store.samples(record["id"])["score"]) == [1.0, 0.5, 0.0]
    capsys.readouterr()
    assert script.main([str(tmp_path), "--judge", "local"]) == 0
    assert capsys.readouterr().out == "every cell is scored\n"


def test_grades_that_came_are_kept_when_the_judge_fails(
    script, tmp_path: Path, answers: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from test_benchmarks_judge import Endpoint, openai_judge

    store = Store(tmp_path)
    answers.loc[0, "score"] = 1.0
    cell(store, "mmvet", answers)
    endpoint = Endpoint("5")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(script, "load_judge", lambda name: openai_judge(endpoint.url, monkeypatch))
    try:
        assert script.main([str(tmp_path), "--judge", "openai"]) == 1
    finally:
        endpoint.close()
    (record,) = store.records()
    assert (record["status"], record["score"]["value"]) == ("not_scored", None)
    assert store.samples(record["id"])["score"].tolist()[0] == 1.0
    assert len(endpoint.seen) == 4, "two answers, two attempts each"
    assert "very-secret" not in capsys.readouterr().out + json.dumps(record)


def test_submission_file(script, tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    samples = pd.DataFrame({"question_id": ["12", "13"], "submission": ["red", "2"], "score": [float("nan")] * 2})
    cell(store, "vqav2_test", samples)
    assert script.main([str(tmp_path / "results"), "--submission", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").iterdir()
    assert json.loads(path.read_text()) == [{"question_id": 12, "answer": "red"}, {"question_id": 13, "answer": "2"}]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "error: no results in"),
        (["--judge", "gpt"], "error: unknown judge 'gpt'; valid judges: openai, local, none"),
    ],
)
def test_wrong_input(script, tmp_path: Path, arguments: list[str], told: str, capsys) -> None:
    if arguments:
        Store(tmp_path)
    assert script.main([str(tmp_path), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(told)
