"""Cells, claimed, computed and stored one by one, whatever came out, be it a result or a failure."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from corematching.evaluation import stopping
from corematching.evaluation.board import Board
from corematching.evaluation.cells import Cell, canonical_json
from corematching.evaluation.experiment import Experiment
from corematching.evaluation.progress import Reporter
from corematching.evaluation.records import describe, new_record
from corematching.results.store import Store

SHARDS_PER_PEER = 2
"""More than one: who is done first takes more. Not many more: pictures and prompts are shared within a shard only."""
OnRecord = Callable[[Cell, dict[str, Any]], None]


def companies(cells: Sequence[Cell], most: int) -> Iterator[tuple[Cell, ...]]:
    """The cells in parts that can be answered together: they differ in their methods only; at most so many a part."""
    alike: dict[str, list[Cell]] = {}
    for cell in cells:
        alike.setdefault(canonical_json({**cell.config, "method": None, "files": None}), []).append(cell)
    for group in alike.values():
        for start in range(0, len(group), most):
            yield tuple(group[start : start + most])


def attempt(
    company: Sequence[Cell],
    experiment: Experiment,
    evaluator: Any,
    store: Store,
    reporter: Reporter,
    on_record: OnRecord = lambda cell, record: None,
    peers: int = 1,
) -> list[Cell]:
    """Compute cells that can be answered together and store each as soon as it is scored, failures included.

    Parameters
    ----------
    peers
        Processes at work on this store: with several, those without cells are offered shards of the questions.

    Returns
    -------
    The cells that another process is at.
    """
    with ExitStack() as claims:
        seen, held = set(), dict[Cell, ExitStack]()
        for cell in company:
            own = claims.enter_context(ExitStack())
            if not own.enter_context(store.claim(cell.id)):
                continue
            seen.add(cell)
            record = store.read(cell.id)
            if record is not None and finished(record, experiment):
                own.close()
                reporter.skip(cell, "done by another process")
                on_record(cell, record)
            else:
                held[cell] = own
        found = computed(tuple(held), experiment, evaluator, reporter, store.root, peers)
        with closing(found):
            for cell, record, samples in found:
                store.write(record, samples)
                held[cell].close()
                reporter.finish(cell, record)
                on_record(cell, record)
        return [cell for cell in company if cell not in seen]


def computed(
    company: tuple[Cell, ...], experiment: Experiment, evaluator: Any, reporter: Any, root: Path, peers: int
) -> Generator[tuple[Cell, dict[str, Any], Any], None, None]:
    """Compute cells that are claimed and can be answered together: each with its record and sample rows, in order.

    Parameters
    ----------
    reporter
        Is told what is begun and how far it is.
    root, peers
        With several peers, those without cells are offered shards of the questions in this folder.

    Raises
    ------
    Stopped
        Between two batches, if the run was asked to stop; not while cells are left that only wait to be scored.
    """
    evaluator.company, evaluator.offer = company, None
    with ExitStack() as offers:
        if company and peers > 1:
            ids = [cell.id for cell in company]
            evaluator.offer = offers.enter_context(Board(root).offering(ids, SHARDS_PER_PEER * peers))
        for cell in company:
            if not evaluator.answered(cell):
                stopping.check()
            reporter.start(cell, company)
            yield cell, *_compute(cell, experiment, evaluator, reporter)


def _compute(cell: Cell, experiment: Experiment, evaluator: Any, reporter: Any) -> tuple[dict[str, Any], Any]:
    """A cell's record and sample rows."""
    started, clock = datetime.now(UTC), time.perf_counter()
    samples = None

    def after_a_batch(done: int, total: int) -> None:
        reporter.advance(done, total)
        if done < total:
            stopping.check()

    try:
        result, samples = evaluator.evaluate(cell, after_a_batch)
    except Exception as error:  # whatever went wrong belongs to this cell, and the sweep goes on
        stopping.check()  # but for what a stop brings with it
        result = {"status": "failed", "error": describe(error)}
    of_others = result.get("timing", {}).pop("seconds_of_others", 0.0)
    seconds = time.perf_counter() - clock - of_others
    return new_record(cell, "accuracy", started, seconds, result, settings=how_made(experiment.settings)), samples


def how_made(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are no part of a cell's identity and are needed to make it again (`corematching.evaluation.again`).

    The data's version names what came out of its settings; batches decide the order of additions.
    """
    names = ("data", "text", "batch_size", "together")
    return {name: settings[name] for name in names if settings.get(name) is not None}


def finished(record: dict[str, Any] | None, experiment: Experiment) -> bool:
    """Whether a cell needs no more work. Failed cells are tried again; unscored ones too if there is a judge now."""
    if record is None or record["status"] == "failed":
        return False
    if experiment.since and begun(record) < experiment.since:
        return False
    return record["status"] == "done" or experiment.settings["judge"]["name"] == "none"


def begun(record: dict[str, Any]) -> float:
    """When work on a stored cell began, in seconds since 1970; 0 if the record does not say."""
    try:
        return datetime.fromisoformat(record["provenance"]["started"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return 0.0
