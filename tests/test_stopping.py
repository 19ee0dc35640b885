"""Stopping: the first signal lets the batch in flight finish, the second ends at once, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import time

import pytest
from test_runner import FakeBench, fake  # noqa: F401

from corematching.evaluation import stopping
from corematching.results.store import Store

RUN = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import test_runner
from corematching import cli
from corematching.evaluation import evaluator, machine, provenance
from corematching.benchmarks.data import DataSource

class Slow(test_runner.FakeBench):
    def evaluate(self, cell, on_progress):
        for batch in range(1, 5):
            print("batch", batch, flush=True)
            time.sleep(float(sys.argv[2]))
            print("answered", batch, flush=True)
            on_progress(batch, 4)
        return super().evaluate(cell, lambda done, total: None)

evaluator.Evaluator = Slow
provenance.model_revision = lambda model: "revision"
DataSource.version = lambda self, benchmark: "version"
sys.exit(cli.main([*test_runner.GRID, "model=tiny", "data=mini", "tracking=none", "report=false", *sys.argv[3:]]))
"""


def slow_run(folder, seconds: float, **environment) -> subprocess.Popen:
    words = [sys.executable, "-c", RUN, os.path.dirname(__file__), str(seconds), f"results_dir={folder}"]
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=folder,
    )


def until(process: subprocess.Popen, line: str) -> None:
    for said in process.stdout:
        if said.startswith(line):
            return
    raise AssertionError(f"it never said {line}")


@pytest.mark.parametrize(
    ("number", "under_slurm", "status"),
    [
        (signal.SIGINT, False, 130),
        (signal.SIGTERM, False, 130),
        (signal.SIGTERM, True, 0),
        (signal.SIGUSR1, False, 0),
    ],
)
def test_the_first_signal_lets_the_batch_finish(fake, tmp_path, monkeypatch, capsys, number, under_slurm, status):  # noqa: F811
    """It comes in the second batch of the second cell."""
    answered, evaluate = [], FakeBench.evaluate
    if under_slurm:
        monkeypatch.setenv("SLURM_JOB_ID", "1")

    def in_batches(self, cell, on_progress):
        for batch in range(1, 5):
            if len(answered) == 5:
                os.kill(os.getpid(), number)
            answered.append(batch)
            on_progress(batch, 4)
        return evaluate(self, cell, lambda done, total: None)

    monkeypatch.setattr(FakeBench, "evaluate", in_batches)
    assert fake() == status
    assert answered == [1, 2, 3, 4, 1, 2]
    assert f"{signal.Signals(number).name}: stopping after the batch in flight" in (out := capsys.readouterr().out)
    assert "1 of 10 cells are stored" in out
    store = Store(tmp_path / "results/quickstart")
    assert [record["status"] for record in store.records()] == ["done"]
    assert list((store.root / "claims").iterdir()) == []
    assert fake() == 0
    assert len(answered) == 6 + 9 * 4


def test_cells_that_only_wait_to_be_scored_are_stored_before_a_stop(fake, tmp_path, monkeypatch):  # noqa: F811
    """The signal comes in the batch that answers the last questions of five cells together."""
    answered, evaluate = set(), FakeBench.evaluate

    def together(self, cell, on_progress):
        if cell not in answered:
            os.kill(os.getpid(), signal.SIGTERM)
            answered.update(self.company)
            on_progress(2, 2)
        return evaluate(self, cell, on_progress)

    with monkeypatch.context() as patch:
        patch.setattr(FakeBench, "evaluate", together)
        patch.setattr(FakeBench, "answered", lambda self, cell: cell in answered)
        assert fake("together=5") == 130
    records = list(Store(tmp_path / "results/quickstart").records())
    assert [record["labels"]["benchmark"] for record in records] == ["gqa"] * 5
    assert fake("together=5") == 0
    assert len(FakeBench.evaluated) == 10


def test_the_second_signal_ends_at_once(tmp_path):
    process = slow_run(tmp_path, 60.0)
    until(process, "batch 1")
    process.send_signal(signal.SIGTERM)
    until(process, "SIGTERM: stopping after the batch in flight")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0].endswith("stopped at once\n")
    assert process.returncode == 130
    store = Store(tmp_path / "quickstart")
    held = {lease.name.split(".")[0] for lease in (store.root / "claims").iterdir()}
    assert held
    for cell in held:
        with store.claim(cell) as mine:
            assert mine, "claims of a process that is gone are free"
    assert list(store.cells.iterdir()) == []


def test_what_a_stop_brings_with_it_is_no_failure_of_the_cell(fake, tmp_path, monkeypatch):  # noqa: F811
    def stopped(self, cell, on_progress):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        raise RuntimeError("the judge was ended by the same Ctrl-C")

    monkeypatch.setattr(FakeBench, "evaluate", stopped)
    assert fake() == 130
    assert list((tmp_path / "results/quickstart/cells").iterdir()) == []


def test_a_schedulers_own_handler_is_called_when_the_run_has_stopped(fake, monkeypatch):  # noqa: F811
    order = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: order.append("requeued"))

    def told(self, cell, on_progress):
        os.kill(os.getpid(), signal.SIGUSR1)
        order.append("batch")
        on_progress(1, 2)

    monkeypatch.setattr(FakeBench, "evaluate", told)
    try:
        assert fake() == 0
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert order == ["batch", "requeued"]


def test_signals_are_given_back(fake):  # noqa: F811
    before = [signal.getsignal(number) for number in stopping._SIGNALS]
    assert fake() == 0
    assert [signal.getsignal(number) for number in stopping._SIGNALS] == before
