"""Kill a sweep at random moments, again and again, then finish it: is everything there, once, and the same?

    python scripts/chaos.py --executor local --kills 30
    python scripts/chaos.py --executor ray --kills 30 --real

24 cells are computed undisturbed, then once more while random processes of the run (it itself, or one of its workers)
are killed with SIGKILL. A run that was killed is started again. At the end the tables and sample rows must be byte for
byte those of the undisturbed run; no cell may have been published twice, no process, claim or staged file be left.
Cells are answered by a stand-in that takes a moment per batch, with ``--real`` by the bundled model. Exit status: 0 all
held, 1 something did not.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SWEEP = ["methods=[dense,random,fastv,corematching]", "keep=[64,16]", "benchmarks=[gqa,pope,textvqa,vizwiz]", "limit=8"]
USUAL = ["data=mini", "data.n=16", "model=tiny", "tracking=none", "report=false", "name=run", "together=2"]
WORDS = [*SWEEP, *USUAL]
LEFT = ("claims", "staging")
AT_WORK = 0.8
"""Share of the kills that wait for a claimed cell: the others come at any time, mostly while programs start."""
STAND_IN = Path(__file__).with_name("chaos_stand_in.py")
HOOK = f"""
import importlib.util, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "corematching.evaluation.evaluator":
            return importlib.util.spec_from_file_location(name, {str(STAND_IN)!r})

sys.meta_path.insert(0, Finder)
"""


@dataclass
class Chaos:
    """One sweep that is disturbed."""

    folder: Path
    executor: str
    real: bool
    draw: random.Random
    killed: dict[str, int] = field(default_factory=lambda: {"run": 0, "worker": 0})
    published: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    started: float = 0.0

    def start(self, name: str, executor: str) -> subprocess.Popen:
        """Start the program."""
        hook = self.folder / "hook"
        hook.mkdir(exist_ok=True)
        self.started = time.time()
        (hook / "sitecustomize.py").write_text("" if self.real else HOOK)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(hook), str(ROOT)]),
            "CM_CACHE": str(self.folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        words = [*WORDS, f"results_dir={self.folder / name}", f"executor={executor}"]
        words += ["executor.workers=2"] if executor != "local" else []
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "corematching", *words], env=environment, stdout=log, stderr=log, cwd=self.folder
            )

    def disturb(self, kills: int) -> None:
        """Kill so often, then let the run finish."""
        run = self.start("disturbed", self.executor)
        while sum(self.killed.values()) < kills:
            self.wait(run)
            self.look()
            if run.poll() is not None:
                run = self.again(run)
                continue
            workers = self.workers(run.pid)
            victim = self.draw.choice(["run", "worker"]) if workers else "run"
            pid = self.draw.choice(workers) if victim == "worker" else run.pid
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            self.killed[victim] += 1
            if victim == "run":
                run.wait()
                self.gone(workers)
                run = self.start("disturbed", self.executor)
        for _ in range(3):
            if run.wait() == 0:
                break
            run = self.again(run)
        self.look()

    def wait(self, run: subprocess.Popen) -> None:
        """Wait for a random moment: mostly of the time in which cells are computed, else of the whole."""
        if self.draw.random() < AT_WORK:
            while run.poll() is None and not self.at_work():
                time.sleep(0.05)
        time.sleep(self.draw.uniform(0.0, 4.0) * (3 if self.real else 1))

    def at_work(self) -> bool:
        """Whether somebody of the latest start holds a cell."""
        for lease in self.folder.glob("disturbed/run/claims/*"):
            with suppress(OSError):
                if lease.stat().st_mtime > self.started:
                    return True
        return False

    def again(self, run: subprocess.Popen) -> subprocess.Popen:
        """What a person does with a run that ended: start it again; from scratch once all cells are there."""
        cells = self.folder / "disturbed/run/cells"
        # 2 is a run that was refused: Ray does not start where the machine is too busy.
        if run.returncode not in ((0, 1, 2) if self.executor == "ray" else (0, 1)):
            self.wrong.append(f"the run ended with status {run.returncode}")
        if run.returncode == 0 and cells.is_dir():
            cells.rename(self.folder / f"round-{time.monotonic_ns()}")
            self.published.clear()
        return self.start("disturbed", self.executor)

    def look(self) -> None:
        """Note new cells, and complain about any that was published again."""
        for path in self.folder.glob("disturbed/run/cells/*/samples.parquet"):
            try:
                written = path.stat().st_mtime_ns
            except OSError:
                continue
            if self.published.setdefault(path.parent.name, written) != written:
                self.wrong.append(f"cell {path.parent.name} was computed again")

    def workers(self, run: int) -> list[int]:
        """Processes that compute for a run, among those that it started, directly or not."""
        marks, parents = ("ray::Worker", "corematching.evaluation.worker"), {run}
        found = processes()
        for _ in range(4):  # the run, Ray's daemon, its workers
            parents |= {pid for pid, parent, _ in found if parent in parents}
        return [pid for pid, _, words in found if pid in parents - {run} and any(mark in words for mark in marks)]

    def gone(self, workers: list[int]) -> None:
        """Complain about workers that outlive their run by more than the time they have."""
        deadline = time.monotonic() + 90
        left = workers
        while left and time.monotonic() < deadline:
            left = [pid for pid, _, _ in processes() if pid in workers]
            time.sleep(0.2)
        self.wrong += [f"worker {pid} outlived its run" for pid in left]

    def compare(self) -> None:
        """Hold what came out against the undisturbed run."""
        one, other = (self.folder / name / "run" for name in ("whole", "disturbed"))
        files = ["table.md", "table.csv", *(str(path.relative_to(one)) for path in one.glob("cells/*/samples.parquet"))]
        self.wrong += [f"{name} differs" for name in files if (one / name).read_bytes() != (other / name).read_bytes()]
        cells = [len(list((place / "cells").iterdir())) for place in (one, other)]
        if cells[0] != cells[1]:
            self.wrong.append(f"{cells[1]} of {cells[0]} cells are there")
        self.wrong += [f"{path} is left" for folder in LEFT for path in (other / folder).iterdir()]


def processes() -> list[tuple[int, int, str]]:
    """Number, parent and command line of all processes that run."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (OSError, ValueError):
            continue
        if folder.name.isdecimal() and state not in "ZX":
            found.append((int(folder.name), int(parent), words))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executor", default="local", choices=("local", "processes", "ray"))
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", action="store_true", help="answer with the bundled model")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        chaos = Chaos(Path(scratch), chosen.executor, chosen.real, random.Random(chosen.seed))
        began = time.monotonic()
        if chaos.start("whole", "local").wait():
            sys.exit((Path(scratch) / "whole.log").read_text())
        chaos.disturb(chosen.kills)
        chaos.compare()
        seconds = time.monotonic() - began
        rounds = len(list(Path(scratch).glob("round-*"))) + 1
        if chaos.wrong:
            print((Path(scratch) / "disturbed.log").read_text()[-3000:])
    told = f"{chaos.killed['run']} runs and {chaos.killed['worker']} workers killed over {rounds} sweeps"
    print(f"{chosen.executor}: {told}, {seconds:.0f} s", *chaos.wrong or ["all held"], sep="\n  ")
    return int(bool(chaos.wrong))


if __name__ == "__main__":
    sys.exit(main())
