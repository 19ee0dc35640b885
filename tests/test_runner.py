"""The runner: loud failures, resume after SIGKILL, shared work; on a fake bench, and once for real with lmms-eval."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import ClassVar

import pandas as pd
import pytest
from small_llava import save_small_llava

from corematching import cli
from corematching.evaluation import evaluator, machine, provenance
from corematching.evaluation.cells import Cell
from corematching.results.store import Store

GRID = [
    "name=quickstart",
    "methods=[dense,random,fastv]",
    "keep=[32,16]",
    "benchmarks=[gqa,pope]",
    "model.visual_tokens=64",
]


class FakeBench:
    """Scores a cell by its keep; `trouble` maps (method, benchmark) to what happens instead."""

    trouble: ClassVar[dict] = {}
    evaluated: ClassVar[list] = []

    def __init__(self, experiment):
        self.experiment = experiment

    def check_methods(self, cells):
        pass

    def prepare(self):
        pass

    def answered(self, cell):
        return False

    def evaluate(self, cell: Cell, on_progress):
        label = cell.label
        self.evaluated.append((label["method"], label["keep"], label["benchmark"]))
        trouble = self.trouble.get((label["method"], label["benchmark"]))
        if trouble:
            raise trouble
        on_progress(2, 2)
        value = 50.0 if label["keep"] is None else 40.0 - 1 / label["keep"]
        result = {
            "status": "done",
            "score": {"metric": "accuracy", "value": value, "scale": 100.0, "note": ""},
            "metrics": {"accuracy": value},
            "n": 2,
            "trace": {"visual_tokens_per_layer": label["keep"] or 64, "kv_bytes": 1e6, "flops": {"prefill": 1e12}},
            "timing": {"model_seconds": 0.1},
        }
        return result, pd.DataFrame({"doc_id": [0, 1], "score": [1.0, 0.0]})


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Run the program on the fake bench in an empty folder; returns a function that gives the exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluator, "Evaluator", FakeBench)
    monkeypatch.setattr(provenance, "model_revision", lambda model: "revision")
    monkeypatch.setattr("corematching.benchmarks.data.DataSource.version", lambda self, benchmark: "version")
    monkeypatch.setattr(FakeBench, "trouble", {})
    monkeypatch.setattr(FakeBench, "evaluated", [])
    return lambda *words: cli.main([*GRID, "tracking=none", "report=false", *words])


def cells_of(folder):
    return {record["id"]: record for record in Store(folder).records()}


def test_a_run_stores_all_cells_and_a_second_run_computes_none(fake, tmp_path, capsys):
    assert fake() == 0
    assert len(FakeBench.evaluated) == 10
    first = (tmp_path / "results/quickstart/table.md").read_text()
    assert "| dense | — | 50.0 | 50.0 | 100.0 |" in first
    assert "| fastv | 32 | 40.0 | 40.0 | 79.9 |" in first
    assert "| fastv | 16 | 39.9 | 39.9 | 79.9 |" in first
    assert "not comparable with published numbers" in first
    assert fake() == 0
    assert len(FakeBench.evaluated) == 10
    assert (tmp_path / "results/quickstart/table.md").read_text() == first
    out = capsys.readouterr().out
    assert "10 already done" in out
    assert out.startswith("NOTE: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]
    table = pd.read_csv(tmp_path / "results/quickstart/table.csv")
    # Dense, then budget by budget, each in the experiment's order.
    assert list(zip(table["method"][1:], table["keep"][1:])) == [
        ("random", 32),
        ("fastv", 32),
        ("random", 16),
        ("fastv", 16),
    ]
    assert list(table["gqa"]) == [50.0, 40.0, 40.0, 39.9, 39.9]


def test_a_failed_cell_is_loud_and_the_sweep_goes_on(fake, tmp_path, capsys):
    FakeBench.trouble[("fastv", "pope")] = RuntimeError("out of\nmemory")
    assert fake() == 1
    out = capsys.readouterr().out
    assert "FAILED, RuntimeError: out of memory" in out
    assert "2 of 10 cells failed" in out
    records = cells_of(tmp_path / "results/quickstart").values()
    failed = [record for record in records if record["status"] == "failed"]
    assert len(failed) == 2
    assert len(records) == 10
    assert "Traceback" in failed[0]["error"]["traceback"]
    assert failed[0]["error"]["type"] == "RuntimeError"
    table = (tmp_path / "results/quickstart/table.md").read_text()
    assert "| fastv | 32 | 40.0 | — | — |" in table
    assert "pope, fastv keep=32: failed (RuntimeError: out of memory)" in table
    FakeBench.trouble.clear()
    FakeBench.evaluated.clear()
    assert fake() == 0, "failed cells are tried again"
    assert FakeBench.evaluated == [("fastv", 32, "pope"), ("fastv", 16, "pope")]


def test_an_interrupt_keeps_what_is_done_and_says_how_to_go_on(fake, capsys):
    FakeBench.trouble[("fastv", "gqa")] = KeyboardInterrupt()
    assert fake() == 130
    assert "2 of 10 cells are stored" in capsys.readouterr().out
    FakeBench.trouble.clear()
    FakeBench.evaluated.clear()
    assert fake() == 0
    assert len(FakeBench.evaluated) == 8


def test_a_schedulers_term_signal_ends_the_run_as_ctrl_c_does(fake, capsys, monkeypatch):
    def terminated(self, cell, on_progress):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(FakeBench, "evaluate", terminated)
    assert fake() == 130
    assert "run the same command again" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_unreadable_cell_is_named_and_computed_again(fake, tmp_path):
    fake()
    folder = next((tmp_path / "results/quickstart/cells").iterdir())
    (folder / "cell.json").write_text("{broken")
    FakeBench.evaluated.clear()
    with pytest.warns(UserWarning, match=folder.name):
        assert fake() == 0
    assert len(FakeBench.evaluated) == 1
    assert json.loads((folder / "cell.json").read_text())["status"] == "done"


def test_cells_that_another_process_computes_are_waited_for_and_not_repeated(fake, tmp_path, monkeypatch, capsys):
    """The other process: holds a claim at first, has finished the cell when the claim ends."""
    store = Store(tmp_path / "results/quickstart")
    fake("results_dir=elsewhere")
    (finished,) = [
        record
        for record in cells_of(tmp_path / "elsewhere/quickstart").values()
        if record["labels"]["method"] == "fastv"
        and record["labels"]["keep"] == 16
        and record["labels"]["benchmark"] == "pope"
    ]
    FakeBench.evaluated.clear()
    shutil.copy(tmp_path / "elsewhere/quickstart/experiment.json", store.root)  # the other process says whose cells
    claim = store.claim(finished["id"])
    assert claim.__enter__()

    def other_process_ends(seconds):
        store.write(finished)
        claim.__exit__(None, None, None)

    monkeypatch.setattr("corematching.evaluation.executors.time.sleep", other_process_ends)
    assert fake() == 0
    assert "waiting for 1 cells" in capsys.readouterr().out
    assert len(FakeBench.evaluated) == 9


def test_tracking_that_breaks_costs_nothing_but_a_line(fake, monkeypatch, capsys):
    def broken(*_):
        raise OSError("no space\nleft")

    monkeypatch.setattr("corematching.tracking.wandb._open_run", broken)
    assert fake("tracking=wandb_offline") == 0
    assert "no tracking (OSError: no space left); results go on" in capsys.readouterr().out

    class BrokenRun:
        def log(self, values):
            raise RuntimeError("lost")

    monkeypatch.setattr("corematching.tracking.wandb._open_run", lambda *_: BrokenRun())
    assert fake("tracking=wandb_offline", "results_dir=other") == 0
    out = capsys.readouterr().out
    assert out.count("tracking stopped (RuntimeError: lost)") == 1


def test_offline_tracking_continues_one_run(fake, tmp_path):
    pytest.importorskip("wandb")
    FakeBench.trouble[("fastv", "gqa")] = KeyboardInterrupt()
    assert fake("tracking=wandb_offline") == 130
    FakeBench.trouble.clear()
    assert fake("tracking=wandb_offline") == 0
    folder = tmp_path / "results/quickstart/wandb"
    identity = (folder / "run_id").read_text()
    runs = list(folder.glob("offline-run-*"))
    assert runs
    # wandb appends a number to the folder's name when both began in the same second; the file has the run's own name.
    assert all([file.name for file in run.glob("*.wandb")] == [f"run-{identity}.wandb"] for run in runs)


# ------------------------------------------------------------------------------------------- for real, with lmms-eval
REAL = [
    "name=quickstart",
    "methods=[dense,random,corematching]",
    "keep=[16]",
    "benchmarks=[gqa]",
    "limit=4",
    "data.n=8",
    "report=false",
]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Command-line words for a real run on a small model, and its environment."""
    checkpoint = save_small_llava(tmp_path_factory.mktemp("model"))
    words = [
        *REAL,
        f"model.path={checkpoint}",
        "model.visual_tokens=64",
        "generation.max_new_tokens=3",
        "tracking=none",
    ]
    return words, {**os.environ, "CM_CACHE": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": "1"}


def test_a_killed_sweep_resumes_to_the_same_table(real, tmp_path, monkeypatch, capsys):
    words, environment = real
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-m", "corematching", *words, f"results_dir={broken}"],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    cells = broken / "quickstart" / "cells"
    try:
        deadline = time.monotonic() + 300
        while not (cells.is_dir() and any(cells.iterdir())):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    survived = {folder.name: (folder / "cell.json").stat().st_mtime_ns for folder in cells.iterdir()}
    assert 1 <= len(survived) < 3
    monkeypatch.setenv("CM_CACHE", environment["CM_CACHE"])
    assert cli.main([*words, f"results_dir={broken}"]) == 0
    assert cli.main([*words, f"results_dir={whole}"]) == 0
    for name, written in survived.items():
        assert (cells / name / "cell.json").stat().st_mtime_ns == written, "a finished cell was computed again"
    assert (broken / "quickstart/table.md").read_text() == (whole / "quickstart/table.md").read_text()
    resumed, uninterrupted = (cells_of(folder / "quickstart") for folder in (broken, whole))
    assert resumed.keys() == uninterrupted.keys()
    for identity, record in resumed.items():
        other = uninterrupted[identity]
        assert record["status"] == "done"
        assert (record["trace"], record["score"], record["metrics"]) == (
            other["trace"],
            other["score"],
            other["metrics"],
        )
        rows, other_rows = (Store(folder / "quickstart").samples(identity) for folder in (broken, whole))
        assert rows.equals(other_rows)
        assert {"doc_id", "part", "unit", "prompt", "prediction", "target", "score"} <= set(rows)
        assert rows["retained_tokens"].between(1, 64).all()
        assert rows["generated_tokens"].between(1, 3).all()
    keeps = {record["labels"]["method"]: record["trace"]["visual_tokens_by_layer"][-1] for record in resumed.values()}
    assert keeps == {"dense": 64, "random": 16, "corematching": 16}


def test_an_exception_in_generation_fails_its_cell(real, tmp_path, monkeypatch):
    from corematching.answering.generator import Generator

    def out_of_memory(*_):
        raise RuntimeError("CUDA out of memory")

    words, environment = real
    monkeypatch.setenv("CM_CACHE", environment["CM_CACHE"])
    monkeypatch.setattr(Generator, "_generate", out_of_memory)
    assert cli.main([*words, "methods=[dense]", f"results_dir={tmp_path}"]) == 1
    (record,) = cells_of(tmp_path / "quickstart").values()
    assert (record["status"], record["error"]["type"]) == ("failed", "RuntimeError")
    assert record["error"]["message"] == "CUDA out of memory"
    assert record["score"] is None


def test_a_method_that_does_nothing_is_an_error(real, tmp_path, monkeypatch):
    from corematching.methods.random import Random

    words, environment = real
    monkeypatch.setenv("CM_CACHE", environment["CM_CACHE"])
    monkeypatch.setattr(Random, "stages", lambda self, geometry: [])
    assert cli.main([*words, "methods=[random]", f"results_dir={tmp_path}"]) == 1
    (record,) = cells_of(tmp_path / "quickstart").values()
    assert record["error"]["type"] == "NothingHappened"
    assert "random" in record["error"]["message"]


def test_worker_processes_share_the_cells(fake, tmp_path, monkeypatch, capsys):
    """Two stand-in workers compute half of the cells each; the parent reports, tracks and prints the table."""
    from corematching.evaluation import executors

    assert fake("results_dir=elsewhere") == 0
    made = cells_of(tmp_path / "elsewhere/quickstart")
    FakeBench.evaluated.clear()

    def stand_in(number, count, log, experiment):
        shares = [record for i, record in enumerate(made.values()) if i % count == number]
        (tmp_path / f"{number}.json").write_text(json.dumps(shares))
        script = (
            "import json, sys\n"
            "from corematching.results.store import Store\n"
            "store = Store(sys.argv[2])\n"
            "for record in json.load(open(sys.argv[1])):\n"
            "    with store.claim(record['id']):\n"
            "        store.write(record)\n"
        )
        return subprocess.Popen(
            [sys.executable, "-c", script, tmp_path / f"{number}.json", experiment.folder],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    monkeypatch.setattr(executors, "_start_worker", stand_in)
    assert fake("executor=processes", "executor.workers=2") == 0
    out = capsys.readouterr().out
    assert "[10/10]" in out
    assert FakeBench.evaluated == []
    table, expected = (tmp_path / folder / "quickstart/table.md" for folder in ("results", "elsewhere"))
    assert table.read_text() == expected.read_text()


def test_workers_get_the_same_command_and_their_own_share_of_the_machine(fake, monkeypatch, tmp_path):
    from corematching.evaluation import executors, machine

    started = []

    class Refusing:
        returncode = 2
        stdin = None

        def __init__(self, words, env, stdin, stdout, stderr, start_new_session):
            started.append((words, env))
            stdout.write(b"NOTE: first\nerror: layer=77 is not a layer of this model\n")

        poll = wait = terminate = lambda self, *_: 2

    monkeypatch.setattr(executors.subprocess, "Popen", Refusing)
    monkeypatch.setattr(machine, "gpu_count", lambda: 2)
    monkeypatch.setattr(machine, "why_small", lambda: "a test")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert fake("executor=processes", "limit=7") == 2
    assert [environment["CUDA_VISIBLE_DEVICES"] for _, environment in started] == ["0", "1"]
    words = started[0][0]
    assert {"limit=7", "executor=local", "tracking=none", "report=false"} <= set(words)
    assert "executor=processes" not in words
    assert started[0][0] == started[1][0]


def test_a_worker_that_dies_is_reported_with_the_end_of_its_log(fake, tmp_path, monkeypatch, capsys):
    from corematching.evaluation import executors

    monkeypatch.setattr(executors, "_POLL_SECONDS", 0.1)

    def dying(number, count, log, experiment):
        script = "import os, signal; print('loading'); print('no \\x1b[31mmemory', flush=True); os.kill(os.getpid(), 9)"
        with log.open("wb") as file:
            return subprocess.Popen([sys.executable, "-c", script], stdout=file)

    monkeypatch.setattr(executors, "_start_worker", dying)
    assert fake("executor=processes", "executor.workers=1") == 1
    out = capsys.readouterr().out
    assert "worker 0 was ended by SIGKILL" in out
    assert "0.log: no \\x1b[31mmemory" in out
    assert "10 cells have not run yet" in out


def test_a_file_in_the_place_of_the_workers_folder_is_one_line(fake, tmp_path, capsys):
    Store(tmp_path / "results/run")
    (tmp_path / "results/run/workers").write_text("")
    assert fake("executor=processes", "name=run") == 2
    assert capsys.readouterr().err.startswith("error: cannot start workers in ")


ORPHAN = """
import subprocess, sys, time
worker = "import time; from corematching import cli; from corematching.evaluation import worker\\n"
worker += "def run():\\n    print('up', flush=True)\\n    time.sleep(60)\\n"
worker += "cli.main = run\\nworker.main()"
child = subprocess.Popen([sys.executable, "-c", worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_worker_ends_when_its_parent_is_killed():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        orphan = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 30
        while (alive := _runs(orphan)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive
    finally:
        parent.kill()
        parent.stdout.close()


def _runs(pid: int) -> bool:
    """Whether a process is there, and not only waiting to be reaped."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_finished_experiment_gets_the_report_it_lacks(fake, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("corematching.evaluation.runner.publish_run", lambda folder, *_: drawn.append(folder))
    report = tmp_path / "results/run/report.html"
    assert fake("name=run") == 0
    assert fake("name=run") == 0
    assert drawn == [], "report=false"
    assert fake("name=run", "report=true") == 0
    report.write_text("")
    assert fake("name=run", "report=true") == 0
    assert len(drawn) == 1, "once while it is missing"
    os.utime(report, ns=(1, 1))
    assert fake("name=run", "report=true") == 0
    assert len(drawn) == 2, "once more when it is older than the cells"


@pytest.mark.parametrize(("wanted", "cells", "count"), [(None, 9, 3), (2, 9, 2), (5, 4, 4)])
def test_worker_count(monkeypatch, wanted, cells, count):
    from corematching.evaluation import executors, machine

    monkeypatch.setattr(machine, "gpu_count", lambda: 3)
    assert executors.worker_count(wanted, cells) == count
    with pytest.raises(ValueError, match=r"executor\.workers=0"):
        executors.worker_count(0, cells)


def test_a_terminal_shows_cells_and_questions_and_a_pipe_plain_lines():
    import io

    from rich.console import Console

    from corematching.evaluation.progress import Reporter

    cell = Cell.of({"a": 1}, benchmark="gqa", method="fastv", keep=64)
    record = {
        "status": "done",
        "score": {"metric": "accuracy", "value": 51.04, "note": ""},
        "trace": {"visual_tokens_per_layer": 149.3},
        "timing": {"seconds": 2.04},
    }
    line = "[1/2] gqa · fastv keep=64: accuracy 51.0, 149 visual tokens per layer (2.0 s)"
    shown = {}
    for terminal in (True, False):
        file = io.StringIO()
        with Reporter(2, Console(file=file, force_terminal=terminal, width=120, highlight=False)) as reporter:
            reporter.start(cell)
            reporter.advance(30, 60)
            if terminal:
                reporter._live.refresh()
            reporter.finish(cell, record)
        shown[terminal] = file.getvalue()
    assert line in shown[True]
    assert "30/60" in shown[True]
    assert shown[False] == line + "\n"


def test_an_ad_hoc_command_leaves_the_experiments_table_alone(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "why_small", lambda: "a test")
    plain = ["model.visual_tokens=64", "tracking=none", "report=false", "limit=9"]
    assert cli.main([*plain, "benchmarks=[gqa]", "name=quickstart"]) == 0
    table = tmp_path / "results/quickstart/table.md"
    before = table.read_bytes()
    assert cli.main([*plain, "method=fastv", "keep=[32,16]", "benchmark=pope"]) == 0
    assert table.read_bytes() == before
    (own,) = [path for path in (tmp_path / "results").iterdir() if path.name.startswith("fastv-keep-32-16-pope")]
    shown = pd.read_csv(own / "table.csv")
    assert list(shown["method"]) == ["dense", "random (layer 2)", "fastv", "random (layer 2)", "fastv"]
    assert f"results/{own.name}/table.md" in capsys.readouterr().out


def test_force_computes_finished_cells_again_once(fake, capsys):
    assert fake() == 0
    FakeBench.evaluated.clear()
    time.sleep(1.1)  # records say when they were begun to the second
    assert fake("force=true") == 0
    assert len(FakeBench.evaluated) == 10
    FakeBench.evaluated.clear()
    assert fake("force=1.5e9") == 0
    assert FakeBench.evaluated == [], "all cells are younger than that"
    assert fake() == 0
    assert FakeBench.evaluated == []
