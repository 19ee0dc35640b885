"""Jobs: several runs of one command, submitted with submitit (its local executor), and the plain job script."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_runner import GRID, FakeBench, fake  # noqa: F401

from corematching import cli
from corematching.results.store import Store

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import chaos  # noqa: E402

SHARDS = ["--multirun", "shard=0,1,2"]


def test_several_runs_share_the_cells_of_one_folder(fake, tmp_path, capsys):  # noqa: F811
    assert fake(*SHARDS) == 0
    assert len(FakeBench.evaluated) == 10
    out = capsys.readouterr().out
    assert [f"cells (shard {shard} of 3)" in out for shard in range(3)] == [True] * 3
    assert [folder.name for folder in (tmp_path / "results").iterdir()] == ["quickstart"]
    shared = (tmp_path / "results/quickstart/table.csv").read_bytes()
    assert fake("results_dir=alone") == 0
    assert (tmp_path / "alone/quickstart/table.csv").read_bytes() == shared


def test_shards_are_neighbours_and_every_cell_is_in_one(fake):  # noqa: F811
    assert fake("shard=0", "shards=2") == 0
    assert {benchmark for _, _, benchmark in FakeBench.evaluated} == {"gqa"}
    assert fake("shard=1", "shards=2") == 0
    assert len(FakeBench.evaluated) == len(set(FakeBench.evaluated)) == 10


def test_a_run_that_fails_is_the_exit_status_of_all(fake, capsys):  # noqa: F811
    FakeBench.trouble[("fastv", "pope")] = RuntimeError("no")
    assert fake(*SHARDS) == 1
    assert len(FakeBench.evaluated) == 10, "the others run"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["shard=3", "shards=3"], "give shards=N and a shard from 0 to N - 1"),
        (["shard=1"], "give shards=N"),
        (["hydra/launcher=submitit_local", "shard=0", "shards=2"], "with --multirun"),
        (["--multirun"], "--multirun has nothing to vary"),
        ([*SHARDS, "hydra.job.chdir=true"], "Hydra's own settings are fixed"),
        ([*SHARDS, "hydra/launcher=joblib"], "valid: basic, submitit_local, submitit_slurm"),
        (["--multirun", "model=tiny,none_such"], "unknown model 'none_such'"),
    ],
)
def test_wrong_words_are_one_line(fake, capsys, words, why):  # noqa: F811
    assert fake(*words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert why in line


def test_without_the_extra_one_line_says_what_to_install(fake, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(cli, "_installed", lambda module: False)
    assert fake(*SHARDS, "hydra/launcher=submitit_slurm") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "pip install 'corematching-bench[slurm]'" in line


def environment(folder: Path) -> dict[str, str]:
    """Of jobs that answer with the stand-in of scripts/chaos.py."""
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(chaos.HOOK)
    path = [str(folder / "site"), *filter(None, sys.path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "CM_CACHE": str(folder / "cache")}


def test_submitit_runs_the_shards_as_jobs(tmp_path):
    pytest.importorskip("submitit")
    words = [*GRID, "model=tiny", "data=mini", "data.n=8", "limit=4", "tracking=none", "report=false"]
    words += ["benchmarks=[gqa]", "--multirun", "shard=0,1"]
    done = subprocess.run(
        [sys.executable, "-m", "corematching", *words, "hydra/launcher=submitit_local"],
        env=environment(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    records = list(Store(tmp_path / "results/quickstart").records())
    assert [record["status"] for record in records] == ["done"] * 5
    jobs = list((tmp_path / "multirun/.submitit").glob("*/*_log.out"))
    assert len(jobs) == 2, "each shard was a job of its own"


STAND_IN = """#!/bin/bash
echo "$@" >> "$LOG"
[ "$(wc -l < "$LOG")" -gt 1 ] && exit 0
trap 'echo signalled >> "$LOG"; exit 0' USR1
echo up >> "$LOG.up"
while :; do sleep 0.05; done
"""


@pytest.mark.parametrize(("array", "share"), [(True, " shard=2 shards=4"), (False, "")])
def test_the_job_script_requeues_after_a_preemption(tmp_path, array, share):
    for name, text in (("python", STAND_IN), ("scontrol", '#!/bin/bash\necho "scontrol $@" >> "$LOG"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    variables = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MAX": "3"} if array else {}
    variables |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "SLURM_JOB_ID": "77"}
    job = subprocess.Popen(
        ["bash", ROOT / "scripts/slurm.sbatch", "+experiment=table1"], env={**os.environ, **variables}
    )
    deadline = time.monotonic() + 30
    while not log.with_suffix(".up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 0
    told = f"-m corematching +experiment=table1{share}"
    assert log.read_text().splitlines() == [told, "signalled", "scontrol requeue 77"]
    log.write_text("before\n")
    done = subprocess.run(["bash", ROOT / "scripts/slurm.sbatch", "x=1"], env={**os.environ, **variables}, check=False)
    assert done.returncode == 0
    assert "scontrol" not in log.read_text()
