"""Where the cells of a run are computed: in this process, or in several that share the store.

An executor gets the cells that are missing, sees to it that they end up in the store, and hands each record on.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from corematching.errors import UserError
from corematching.evaluation import asks, machine, stopping
from corematching.evaluation.attempt import OnRecord, attempt, companies, finished
from corematching.evaluation.board import Board
from corematching.evaluation.cells import Cell
from corematching.evaluation.experiment import Experiment
from corematching.evaluation.progress import Reporter
from corematching.results.store import Store
from corematching.texts import neutral

_POLL_SECONDS = 2.0


def run_locally(
    experiment: Experiment, pending: Sequence[Cell], store: Store, reporter: Reporter, on_record: OnRecord
) -> None:
    """All cells in this process; cells that another process holds are waited for at the end, or helped with."""
    from corematching.evaluation.evaluator import Evaluator  # torch and transformers, seconds to import

    evaluator = Evaluator(experiment)
    evaluator.prepare()
    peers = experiment.settings["executor"]["peers"]
    waiting = list(pending)
    while waiting:
        elsewhere: list[Cell] = []
        for company in companies(waiting, experiment.settings["together"]):
            stopping.check()
            elsewhere += attempt(company, experiment, evaluator, store, reporter, on_record, peers)
        if elsewhere and len(elsewhere) == len(waiting):
            if peers == 1 or not help_others(experiment, evaluator, store.root):
                time.sleep(_POLL_SECONDS)
                stopping.check()
        elif elsewhere:
            holders = {str(store.holder(cell.id) or "another process") for cell in elsewhere}
            reporter.say(f"waiting for {len(elsewhere)} cells that others are computing: {', '.join(sorted(holders))}")
        waiting = elsewhere


def help_others(experiment: Experiment, evaluator: Any, root: Path) -> int:
    """Answer questions of cells that other processes hold; returns how many shards there were to answer."""
    known = {cell.id: cell for cell in experiment.cells}
    return sum(
        evaluator.help([known[cell] for cell in offer.cells], offer)
        for offer in Board(root).offers()
        if known.keys() >= set(offer.cells)
    )


def run_in_processes(
    experiment: Experiment, pending: Sequence[Cell], store: Store, reporter: Reporter, on_record: OnRecord
) -> None:
    """The same command in several worker processes, which share the cells through the store's claims.

    Workers are spread over the GPUs, or share the CPU cores evenly. What they print goes to ``workers/<number>.log``.

    Raises
    ------
    UserError
        What a worker had to say if all of them refused to start.
    """
    wanted = experiment.settings["executor"]["workers"]
    # With fewer cells than GPUs (or than asked for), workers share the questions of the cells there are.
    count = worker_count(wanted, max(len(pending), machine.gpu_count(), wanted or 1))
    folder = store.root / "workers"
    logs = [folder / f"{number}.log" for number in range(count)]
    workers: list[subprocess.Popen] = []
    waiting, alive = list(pending), set(range(count))
    try:
        folder.mkdir(exist_ok=True)
        for number, log in enumerate(logs):
            workers.append(_start_worker(number, count, log, experiment))
        reporter.say(f"{count} workers; their output is in {folder}")
        while alive:
            time.sleep(_POLL_SECONDS / 4)
            stopping.check()
            waiting = _collect(waiting, experiment, store, reporter, on_record)
            for number in [number for number in alive if workers[number].poll() is not None]:
                alive.remove(number)
                if died := _died(workers[number].returncode, logs[number]):
                    reporter.say(f"worker {number} {died}")
    except OSError as error:
        raise UserError(f"cannot start workers in '{folder}' ({error.strerror or error})") from error
    finally:
        _stop(workers)
    _collect(waiting, experiment, store, reporter, on_record, failures=True)
    if all(worker.returncode == 2 for worker in workers):
        raise UserError(last_words(logs[0]).removeprefix("error: "))


def _stop(workers: Sequence[subprocess.Popen]) -> None:
    """End all workers, first asked, then forced."""
    for worker in workers:
        worker.terminate()
    for worker in workers:
        try:
            worker.wait(stopping.GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        if worker.stdin is not None:
            worker.stdin.close()


def _died(status: int, log: Path) -> str | None:
    """How a worker ended that neither finished nor refused, with the end of its log; None for the others."""
    if status in (0, 1, 2):
        return None
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"{how}; the others take its cells. Its last words in {log}: {last_words(log)}"


def last_words(log: Path) -> str:
    """The last line of a worker's log."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError as error:
        return f"(unreadable: {error.strerror})"
    return neutral(lines[-1])[-300:] if lines else "(nothing)"


def worker_count(wanted: int | None, cells: int) -> int:
    """Workers to start: as asked for, or one per GPU, or one per two CPU cores; never more than cells.

    Raises
    ------
    UserError
        If `wanted` is no positive count.
    """
    if wanted is not None and (not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1):
        raise UserError(f"executor.workers={wanted} is not valid: give a count of at least 1, or null")
    usual = machine.gpu_count() or max(1, len(os.sched_getaffinity(0)) // 2)
    return min(wanted or usual, cells)


def fair_company(experiment: Experiment, workers: int) -> int:
    """Most cells that one of several workers takes at once.

    So many that there are some for each of the others; as many as ever where there are fewer cells than workers, which
    then share the questions.
    """
    if len(experiment.cells) < workers:
        return experiment.settings["together"]
    of_benchmark = Counter(cell.label["benchmark"] for cell in experiment.cells)
    return min(experiment.settings["together"], math.ceil(max(of_benchmark.values()) / workers))


def _start_worker(number: int, count: int, log: Path, experiment: Experiment) -> subprocess.Popen:
    environment = dict(os.environ)
    if gpus := machine.gpu_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % gpus]
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    own = ("executor", "tracking", "report", "force", "together")
    words = [word for word in experiment.settings["command"] if asks.key_of(word) not in own]
    words += ["executor=local", f"executor.peers={count}", f"together={fair_company(experiment, count)}"]
    words += ["tracking=none", "report=false"]
    words += [f"force={experiment.since:.0f}"] if experiment.since else []  # recomputed once, by whoever comes first
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "corematching.evaluation.worker", *words],
            env=environment,
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for this process, which asks its workers to stop
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def _collect(
    waiting: Sequence[Cell],
    experiment: Experiment,
    store: Store,
    reporter: Reporter,
    on_record: OnRecord,
    failures: bool = False,
) -> list[Cell]:
    """Report the cells that workers have finished (at the end also those that failed); returns the rest."""
    rest = []
    for cell in waiting:
        record = store.read(cell.id) if (store.cells / cell.id).exists() else None
        if record is not None and (failures or finished(record, experiment)):
            reporter.finish(cell, record)
            on_record(cell, record)
        else:
            rest.append(cell)
    return rest


def run_on_ray(*arguments: Any) -> None:
    """See `corematching.evaluation.on_ray`; imported when it is asked for."""
    from corematching.evaluation import on_ray

    on_ray.run_on_ray(*arguments)


EXECUTORS: dict[str, Callable[..., None]] = {
    "local": run_locally,
    "processes": run_in_processes,
    "ray": run_on_ray,
}
