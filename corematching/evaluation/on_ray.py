"""``executor=ray``: cells on the workers of a Ray cluster, or of a Ray that this machine starts for the run.

This process plans, holds the claims, gives companies of cells to workers, and stores what comes back: the store is the
only truth, and nodes need not see it. A worker that dies is replaced, and its cells go to another one.
"""

from __future__ import annotations

import glob
import logging
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import corematching
from corematching.errors import UserError
from corematching.evaluation import stopping
from corematching.evaluation.attempt import OnRecord, companies, finished
from corematching.evaluation.cells import Cell
from corematching.evaluation.executors import fair_company, last_words
from corematching.evaluation.experiment import Experiment
from corematching.evaluation.progress import Reporter
from corematching.evaluation.ray_worker import Worker
from corematching.evaluation.records import new_record
from corematching.results.manifest import FILE
from corematching.results.store import Store

_POLL_SECONDS = 0.5
_INHERITED = ("CM_", "HF_", "OMP_", "TOKENIZERS_", "TRANSFORMERS_", "CUDA_", "PYTORCH_", "OPENBLAS_")
"""Beginnings of environment variables that workers get from this process."""


def run_on_ray(
    experiment: Experiment, pending: Sequence[Cell], store: Store, reporter: Reporter, on_record: OnRecord
) -> None:
    """All cells on the workers of a Ray cluster.

    Raises
    ------
    UserError
        If Ray is not installed or not there, or the model cannot be loaded.
    """
    with _connected(experiment.settings["executor"]) as ray:
        fleet = Fleet(ray, experiment, pending, store, reporter, on_record)
        try:
            fleet.run()
        except KeyboardInterrupt:
            fleet.stop()
            raise
        finally:
            fleet.release()


@contextmanager
def _connected(settings: Any) -> Iterator[Any]:
    """Ray, connected; what was started here is stopped again."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise UserError(
            "executor=ray needs Ray, which is not installed: pip install 'corematching-bench[ray]'"
        ) from None
    if ray.is_initialized():
        yield ray
        return
    own = settings["address"] is None and "RAY_ADDRESS" not in os.environ
    options: dict[str, Any] = {"address": settings["address"]}
    if own:  # "local": with None, Ray takes up a cluster that it finds traces of on this machine, be it long gone
        options = {"address": "local", "include_dashboard": False, "object_store_memory": 200 * 2**20}
    with stopping.kept():  # Ray sets a handler of its own
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except Exception as error:  # Ray's own are of any type, also the bare one
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            if own:
                raise UserError(f"executor=ray: Ray does not start on this machine ({reason})") from error
            raise UserError(
                f"executor.address={settings['address']} is not valid here ({reason}); give null for this machine, "
                "auto, or ray://HOST:10001"
            ) from error
    try:
        yield ray
    finally:
        with stopping.kept():
            ray.shutdown()


@dataclass
class _Seat:
    """A worker's place: who sits there, and what it is at."""

    number: int
    actor: Any = None
    where: dict[str, Any] = field(default_factory=dict)
    company: tuple[Cell, ...] = ()
    claims: ExitStack = field(default_factory=ExitStack)
    batch_size: int = 1
    idle_until: float = 0.0
    progress: Any = None


class Fleet:
    """The workers of one run, and which of them is at what."""

    def __init__(
        self,
        ray: Any,
        experiment: Experiment,
        pending: Sequence[Cell],
        store: Store,
        reporter: Reporter,
        on_record: OnRecord,
    ):
        self.ray, self.experiment, self.store = ray, experiment, store
        self.reporter, self.on_record = reporter, on_record
        settings = experiment.settings["executor"]
        resources = ray.cluster_resources()
        self._gpu = resources.get("GPU", 0) >= 1 and experiment.settings["model"]["device"] != "cpu"
        fitting = int(resources["GPU"]) if self._gpu else int(resources.get("CPU", 1) // settings["cpus"])
        self._count = min(settings["workers"] or fitting, max(fitting, 1))
        if settings["workers"] and settings["workers"] > fitting:
            reporter.say(f"the cluster has room for {fitting} workers, not for {settings['workers']}")
        together = fair_company(experiment, self._count)
        self._queue: deque[tuple[Cell, ...]] = deque(companies(pending, together))
        self._tries: Counter[Cell] = Counter()
        self._unready = 0
        self._flying: dict[Any, _Seat] = {}
        """What is to come, by who makes it."""
        self._peers = 1
        self._seats = [_Seat(number, batch_size=experiment.settings["batch_size"]) for number in range(self._count)]

    def run(self) -> None:
        """Compute all cells; returns when they are stored."""
        seats = self._seats
        for seat in seats:
            self._hire(seat)
        self.reporter.say(f"{len(seats)} workers on Ray, {'one GPU' if self._gpu else 'CPU only'} each")
        while self._queue or any(seat.company for seat in seats):
            stopping.check()
            ready, _ = self.ray.wait(list(self._flying), timeout=_POLL_SECONDS) if self._flying else ([], [])
            if not self._flying:
                time.sleep(_POLL_SECONDS)
            for reference in ready:
                self._landed(self._flying.pop(reference), reference)
            busy = {id(seat) for seat in self._flying.values()}
            for seat in seats:
                if id(seat) not in busy:
                    self._send(seat)
            self._show(seats)

    def stop(self) -> None:
        """Let the batches in flight finish, and store the cells that are done."""
        for seat in self._flying.values():
            with suppress(self.ray.exceptions.RayError):
                seat.actor.stop.remote()
        deadline = time.monotonic() + stopping.GRACE_SECONDS
        while self._flying and time.monotonic() < deadline:
            ready, _ = self.ray.wait(list(self._flying), timeout=_POLL_SECONDS)
            for reference in ready:
                seat = self._flying.pop(reference)
                with suppress(Exception):
                    self._store(seat, self.ray.get(reference))

    def release(self) -> None:
        """Give up all claims and workers."""
        for seat in self._seats:
            seat.claims.close()
            seat.actor = None

    # ------------------------------------------------------------------------------------------------------- workers
    def _hire(self, seat: _Seat) -> None:
        """Put a new worker in a seat; it loads the model first."""
        executor = self.experiment.settings["executor"]
        settings = {**self.experiment.settings, "batch_size": seat.batch_size}
        room = {"num_gpus": 1, "num_cpus": 0} if self._gpu else {"num_cpus": executor["cpus"]}
        actor = self.ray.remote(Worker).options(max_concurrency=3, runtime_env=self._environment(), **room)
        seat.actor = actor.remote(replace(self.experiment, settings=settings))
        seat.where, seat.progress = {}, None
        self._flying[seat.actor.load.remote()] = seat

    def _environment(self) -> dict[str, Any]:
        executor = self.experiment.settings["executor"]
        variables = {name: value for name, value in os.environ.items() if name.startswith(_INHERITED)}
        variables.pop("CUDA_VISIBLE_DEVICES", None)  # Ray says which
        if not self._gpu:
            variables["OMP_NUM_THREADS"] = str(executor["cpus"])
        if executor["address"] is None:
            return {"env_vars": {**variables, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
        package = Path(corematching.__file__).parent
        return {"env_vars": variables, "py_modules": [str(package), str(package.parent / "conf")]}

    def _send(self, seat: _Seat) -> None:
        """Give a free worker cells; where there are none, questions of others' cells."""
        if not seat.where:
            self._welcome(seat)
        for _ in range(len(self._queue)):  # each once: what others hold comes back into the queue
            company = self._claimed(seat, self._queue.popleft())
            if company:
                seat.company = company
                peers = 1 if self._queue else self._peers  # shards are for workers without cells
                self._flying[seat.actor.compute.remote(company, self.store.root.absolute(), peers)] = seat
                return
        if self._peers > 1 and time.monotonic() > seat.idle_until and any(one.company for one in self._flying.values()):
            self._flying[seat.actor.help.remote(self.store.root.absolute())] = seat

    def _welcome(self, seat: _Seat) -> None:
        """Ask a worker that has its model where it is, and whether it sees the store."""
        with suppress(self.ray.exceptions.RayError):
            seat.where = self.ray.get(seat.actor.where.remote(), timeout=30)
            manifest = self.store.root.absolute() / FILE
            if self._count > 1 and self.ray.get(seat.actor.sees.remote(manifest), timeout=30):
                self._peers = self._count

    def _claimed(self, seat: _Seat, company: Sequence[Cell]) -> tuple[Cell, ...]:
        """Those of the cells that are now ours to compute."""
        held = []
        for cell in company:
            if not seat.claims.enter_context(self.store.claim(cell.id)):
                self._queue.append((cell,))
                continue
            record = self.store.read(cell.id)
            if record is not None and finished(record, self.experiment):
                self.reporter.skip(cell, "done by another process")
                self.on_record(cell, record)
            else:
                held.append(cell)
        if not held:
            seat.claims.close()
        return tuple(held)

    # ------------------------------------------------------------------------------------------------------- results
    def _landed(self, seat: _Seat, reference: Any) -> None:
        try:
            result = self.ray.get(reference)
        except UserError as error:  # as Ray has it, with the whole traceback
            raise UserError(str(getattr(error, "cause", error))) from None
        except self.ray.exceptions.RayError as error:
            self._died(seat, error)
            return
        if isinstance(result, list):
            self._store(seat, result)
        elif isinstance(result, int) and not result:
            seat.idle_until = time.monotonic() + 2 * _POLL_SECONDS

    def _store(self, seat: _Seat, found: Any) -> None:
        """Store what a worker has computed, and free its claims."""
        for cell, record, samples in found or ():
            self.store.write(record, samples)
            self.reporter.finish(cell, record)
            self.on_record(cell, record)
        seat.claims.close()
        seat.company = ()

    def _died(self, seat: _Seat, error: Exception) -> None:
        """Say what became of a worker, put its cells back, and hire another one."""
        memory = isinstance(error, self.ray.exceptions.OutOfMemoryError)
        if memory and seat.batch_size > 1:
            seat.batch_size //= 2
        self.reporter.say(
            f"worker {seat.number} died ({_place(seat)}): {_reason(error)}"
            + (f"; its next batches are of {seat.batch_size}" if memory else "")
        )
        limit, company = self.experiment.settings["executor"]["tries"], seat.company
        if not company and not seat.where:
            self._unready += 1
            if self._unready >= limit * self._count:
                raise UserError(f"workers die before they have a model ({_reason(error)}); {_place(seat)}")
        self._tries.update(company)
        lost = [cell for cell in company if self._tries[cell] >= limit]
        self._store(seat, [(cell, self._failure(cell, seat, error), None) for cell in lost])
        # One by one from now on, so that a cell that kills workers takes no others with it.
        self._queue.extendleft((cell,) for cell in reversed(company) if cell not in lost)
        self._hire(seat)

    def _failure(self, cell: Cell, seat: _Seat, error: Exception) -> dict[str, Any]:
        message = f"{self._tries[cell]} workers died over this cell: {_reason(error)}"
        told = {"type": type(error).__name__, "message": message, "traceback": f"{_place(seat)}\n{error}"}
        return new_record(cell, "accuracy", datetime.now(UTC), 0.0, {"status": "failed", "error": told})

    # ------------------------------------------------------------------------------------------------------- display
    def _show(self, seats: Sequence[_Seat]) -> None:
        """One line per worker on a terminal."""
        if not self.reporter.live:
            return
        for seat in seats:
            with suppress(self.ray.exceptions.RayError):
                if seat.progress is None:
                    seat.progress = seat.actor.progress.remote()
                elif self.ray.wait([seat.progress], timeout=0)[0]:
                    self.reporter.worker(seat.number, *self.ray.get(seat.progress))
                    seat.progress = None


def _place(seat: _Seat) -> str:
    """Where a worker was, with the end of its log if this machine has it."""
    if not seat.where:
        return "before it had a model; see Ray's logs"
    said = f"process {seat.where['pid']} on {seat.where['node']}, log {seat.where['log']}"
    here = sorted(glob.glob(seat.where["log"]))
    return f"{said}; its last words: {last_words(Path(here[0]))}" if here else said


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
