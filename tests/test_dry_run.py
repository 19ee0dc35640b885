"""``dry_run=true``: what there is to do and how long it takes, at once, without torch and without touching anything."""

import os
import re
import subprocess
import sys

import pandas as pd
import pytest
from conftest import make_prompt
from test_configs import composed, no_files  # noqa: F401  # a fixture

from corematching.cost.shapes import Shapes
from corematching.evaluation import forecast, provenance
from corematching.evaluation.dry_run import dry_run
from corematching.evaluation.experiment import plan
from corematching.evaluation.forecast import Forecast
from corematching.results.store import Store

GRID = ["methods=[dense,random,fastv]", "keep=[64]", "benchmarks=[gqa,pope]", "limit=20", "model=tiny", "data=mini"]


def lines(capsys, *words):
    assert dry_run(composed(*words)) == 0
    return capsys.readouterr().out


def record_cell(folder, cell, seconds, tokens=2.0):
    """A finished cell of this machine that took so many seconds for 20 questions."""
    made = {
        "schema": 1,
        "kind": "accuracy",
        "id": cell.id,
        "status": "done",
        "config": cell.config,
        "labels": cell.label,
        "n": 20,
        "score": {"metric": "accuracy", "value": 50.0, "scale": 100.0, "note": ""},
        "trace": {
            "visual_tokens_per_layer": 576.0,
            "kv_bytes": 1e6,
            "flops": {"prefill": 1e10, "total": 1.2e10},
            "generated_tokens": tokens,
        },
        "timing": {"seconds": seconds},
        "provenance": {"hardware": provenance.hardware(), "versions": {}, "started": "2026-01-01T00:00:00+00:00"},
    }
    Store(folder).write(made, pd.DataFrame({"doc_id": range(20), "score": [1.0] * 20}))


def test_it_counts_cells_and_questions_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CM_CACHE", str(tmp_path / "cache"))
    out = lines(capsys, *GRID, f"results_dir={tmp_path / 'results'}")
    assert "6 cells on tiny with mini data, 0 done, 6 to do" in out
    assert "gqa: 3 cells to do, 20 questions each" in out
    assert "questions: 120\n" in out
    for word in (
        "time: about",
        "memory: about",
        "disk: about",
        "to download: nothing",
        "nothing was measured here yet",
    ):
        assert word in out
    assert list(tmp_path.iterdir()) == []


def test_finished_cells_count_as_done_and_correct_the_time(tmp_path, capsys, no_files, monkeypatch):  # noqa: F811
    monkeypatch.setattr("corematching.benchmarks.data.DataSource.version_at_hand", lambda self, benchmark: "version")
    words = [*GRID, f"results_dir={tmp_path}", "name=grid"]
    planned = plan(composed(*words))
    record_cell(planned.folder, planned.cells[0], seconds=1000.0)
    planned.manifest.write(planned.folder)
    out = lines(capsys, *words)
    assert "1 done, 5 to do" in out
    assert "from 1 earlier cells on this machine" in out
    # Fifty seconds a question when dense, a good deal less for 64 tokens: five cells of 20 questions.
    assert 20 < float(re.search(r"time: about (\d+) min", out)[1]) < 80, out


def test_the_nearest_earlier_cells_correct(tmp_path):
    past = [
        forecast.Past("tiny", "gqa", 1e10, 2.0, 1.0),
        forecast.Past("tiny", "pope", 1e10, 2.0, 3.0),
        forecast.Past("other", "mme", 1e10, 2.0, 9.0),
    ]
    known = Forecast({"name": "tiny"}, None, 1e10, 1e10, "a test", tuple(past))
    assert known.correction("gqa") == 1.0
    assert known.correction("pope") == 3.0
    assert known.correction("vizwiz") == 2.0, "the same model's"
    assert Forecast({"name": "new"}, None, 1e10, 1e10, "a test", tuple(past)).correction("gqa") == 3.0
    assert Forecast({"name": "new"}, None, 1e10, 1e10, "a test", ()).correction("gqa") == 1.0


def test_data_and_models_that_are_not_here_are_named_and_not_fetched(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["+experiment=table1", "model=llava_1_5_7b", "data=hub", f"results_dir={tmp_path / 'results'}"]
    out = lines(capsys, *words)
    assert "model llava-hf/llava-1.5-7b-hf" in out
    assert "dataset lmms-lab-encoder/GQA" in out
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("experiment", "methods"), [("efficiency", 10), ("efficiency_slice", 4)])
def test_the_efficiency_road_has_one_too(tmp_path, capsys, experiment, methods):
    words = [f"+experiment={experiment}", "model=llava_1_5_7b", "model.weights=random", f"results_dir={tmp_path}"]
    out = lines(capsys, *words)
    assert f"{methods} methods at" in out
    assert f"{methods} to measure" in out
    assert "time: about" in out


def test_shapes_agree_with_the_counted_flops(random_llava):
    import corematching as cm

    with cm.build_method("dense")(random_llava) as trace:
        random_llava.generate(**make_prompt(0), max_new_tokens=3, min_new_tokens=3)
    counted, config = cm.flops(random_llava.config, trace), random_llava.config
    shapes = Shapes(config.to_dict())
    rows = [float(tokens) for tokens in trace.samples[0].llm_tokens]
    assert shapes.prefill_flops(rows) == pytest.approx(counted.vision + counted.projector + counted.prefill, rel=0.15)
    steps = 2 * shapes.step_flops([row + 1 for row in rows])
    assert steps == pytest.approx(counted.decode + counted.lm_head * 2 / 3, rel=0.02)
    assert shapes.weights == pytest.approx(sum(one.numel() for one in random_llava.parameters()), rel=0.3)


def test_a_thousand_cells_need_no_torch(tmp_path):
    script = (
        "import sys\n"
        "from corematching.cli import main\n"
        "code = main(['+experiment=table1', 'model=llava_1_5_7b', 'model.weights=random', 'data=hub',\n"
        "             'keep=[192,160,128,96,64,48,32,16,8,4,2]', 'dry_run=true'])\n"
        "heavy = {'torch', 'transformers', 'lmms_eval', 'pandas', 'datasets'} & set(sys.modules)\n"
        "assert code == 0 and not heavy, (code, heavy)\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_HUB_CACHE": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1000 cells" in done.stdout
    assert list(tmp_path.iterdir()) == []
