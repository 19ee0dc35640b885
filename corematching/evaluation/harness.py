"""One call of lmms-eval, with its side effects undone and its traps closed."""

import argparse
import contextlib
import random
import tempfile
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch


def evaluate(model: Any, tasks: Sequence[Any], seed: int = 0) -> dict[str, Any]:
    """Run lmms-eval's `simple_evaluate` on task objects and return its results.

    Whatever a task writes (submission files) goes to a temporary folder: the samples that the caller stores hold the
    same predictions. An exception hidden in lmms-eval's retries is raised as itself.

    Parameters
    ----------
    model
        An lmms-eval model object.
    tasks
        Task objects, built for simple-style models.
    seed
        For every random generator that lmms-eval sets.
    """
    from tenacity import RetryError

    from corematching.benchmarks.lmms import tasks as lmms_tasks  # first: imports lmms-eval without its side effects

    simple_evaluate = import_module("lmms_eval.evaluator").simple_evaluate
    with host_state(), no_bars(), no_git(), tempfile.TemporaryDirectory() as scratch:
        # Without these settings lmms-eval decodes every picture a second time and keeps lists of them in its results.
        arguments = argparse.Namespace(process_with_media=False, output_path=scratch, reasoning_tags=None)
        try:
            return simple_evaluate(
                model=model,
                tasks=list(tasks),
                # Tasks come as objects; indexing the stock ones would take five seconds.
                task_manager=lmms_tasks.TaskManager(include_defaults=False),
                bootstrap_iters=0,
                log_samples=True,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                cli_args=arguments,
            )
        except RetryError as error:
            raise (error.last_attempt.exception() or error) from None


@contextlib.contextmanager
def host_state() -> Iterator[None]:
    """Give back the random generators' states, which lmms-eval overwrites."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if gpu:
            torch.cuda.set_rng_state_all(gpu)


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Without lmms-eval's progress bars, which would break into the caller's."""
    evaluator: Any = import_module("lmms_eval.evaluator")
    bars = evaluator.tqdm
    evaluator.tqdm = lambda *words, **named: bars(*words, **{**named, "disable": True})
    try:
        yield
    finally:
        evaluator.tqdm = bars


@contextlib.contextmanager
def no_git() -> Iterator[None]:
    """Without asking git which commit of lmms-eval this is: four processes per cell, for entries that nobody reads."""
    evaluator: Any = import_module("lmms_eval.evaluator")
    names = ("get_git_commit_hash", "get_git_branch_name")
    asked = {name: getattr(evaluator, name) for name in names}
    for name in names:
        setattr(evaluator, name, lambda: None)
    try:
        yield
    finally:
        for name in names:
            setattr(evaluator, name, asked[name])
