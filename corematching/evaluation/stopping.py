"""Stop a run: the first signal lets the batch in flight finish, the second ends the program at once.

Signals only leave a note here; whoever is at a good place to stop asks `check`. What is stored is whole either way:
everything that a run writes appears in one rename.

``SIGINT`` and ``SIGTERM`` end a run with status 130. A scheduler that takes the machine away and starts the job again
(``SIGUSR1``; under SLURM ``SIGTERM``, too) gets status 0: the same command goes on where this one stopped. Where
submitit runs the job it asks by ``SIGUSR2`` (or ``SIGUSR1``), and its own handler, which puts the job back into the
queue, is called when the run has stopped.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED, TO_BE_CONTINUED = 130, 0
GRACE_SECONDS = 60.0
"""For a process that was asked to stop, to finish its batch; then it is ended as it is."""
_SCHEDULERS = (signal.SIGUSR1, signal.SIGUSR2)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, *_SCHEDULERS)


class Stopped(KeyboardInterrupt):
    """Raised where a run that was asked to stop can do so."""


class _State:
    """What this process was asked; of a process, since signals are."""

    asked: int | None = None
    before: dict[int, Any] = {}  # noqa: RUF012


def check() -> None:
    """Stop here if that was asked for.

    Raises
    ------
    Stopped
        If it was.
    """
    if _State.asked is not None:
        raise Stopped


def ask(number: int = signal.SIGINT) -> None:
    """Ask this process to stop, as a first signal does."""
    _State.asked = number


@contextmanager
def stoppable(say: Callable[[str], None]) -> Iterator[None]:
    """Let signals stop what runs in the block; outside the main thread, leave them alone."""
    _State.asked = None
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        if _State.asked in (*_SCHEDULERS, signal.SIGTERM) and number not in (_State.asked, signal.SIGINT):
            _State.asked = number if number in _SCHEDULERS else _State.asked
            return  # a scheduler that gives notice by two different signals means one thing
        if _State.asked is not None:
            # Nothing is cleaned up: claims of a process that is gone are free, half-written files are not results.
            os.write(sys.stderr.fileno() if sys.stderr else 2, b"stopped at once\n")
            os._exit(INTERRUPTED)
        _State.asked = number
        name = signal.Signals(number).name
        say(f"{name}: stopping after the batch in flight; once more stops at once")

    _State.before = _handlers()
    with kept():
        for number in _SIGNALS:
            signal.signal(number, handle)
        yield


def _handlers() -> dict[int, Any]:
    """The handlers of all signals that stop a run."""
    return {number: signal.getsignal(number) for number in _SIGNALS}


@contextmanager
def kept() -> Iterator[None]:
    """Give signals back their handlers after a block in which a library sets its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = _handlers()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def exit_status() -> int:
    """Of a run that was stopped; calls the scheduler's own handler, which may not return."""
    number = _State.asked
    scheduled = number in _SCHEDULERS or (number == signal.SIGTERM and "SLURM_JOB_ID" in os.environ)
    handler = _State.before.get(number) if number is not None else None
    if number in _SCHEDULERS and callable(handler):
        handler(number, None)
    return TO_BE_CONTINUED if scheduled else INTERRUPTED
