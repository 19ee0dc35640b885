"""Run an experiment: what is not in the store yet is computed, one model load and one task build per benchmark."""

import os
from collections.abc import Iterator, Sequence

from omegaconf import DictConfig

from corematching.evaluation import stopping
from corematching.evaluation.attempt import finished
from corematching.evaluation.banner import banner, small_note
from corematching.evaluation.cells import Cell
from corematching.evaluation.executors import EXECUTORS
from corematching.evaluation.experiment import Experiment, plan
from corematching.evaluation.forecast import cell_weights
from corematching.evaluation.progress import Reporter
from corematching.evaluation.publishing import outdated, publish_run
from corematching.results import remote
from corematching.results.store import Store
from corematching.results.table import build_table
from corematching.results.terminal import show
from corematching.tracking import start_tracking


def run_experiment(config: DictConfig) -> int:
    """Run the composed experiment and print its table.

    Returns
    -------
    int
        Exit status: 0 all cells have results, 1 some failed, 130 interrupted (0 if the job is to be continued, see
        `corematching.evaluation.stopping`).

    Raises
    ------
    UserError
        For anything wrong that can be known before the first cell runs.
    """
    prepare_libraries()
    experiment = plan(config)
    known = Store(experiment.folder) if experiment.folder.is_dir() else None
    pending = [cell for cell in experiment.mine if known is None or not finished(known.read(cell.id), experiment)]
    if pending:
        _check(experiment, pending)
    store = known or Store(experiment.folder)
    experiment.manifest.write(experiment.folder)
    with Reporter(len(pending), weights=cell_weights(experiment, pending)) as reporter:
        for line in headline(experiment, len(pending)):
            reporter.say(line)
        if pending:
            try:
                with stopping.stoppable(reporter.say):
                    _run(experiment, pending, store, reporter)
            except KeyboardInterrupt:
                stored = sum(finished(store.read(cell.id), experiment) for cell in experiment.cells)
                reporter.say(
                    f"interrupted: {stored} of {len(experiment.cells)} cells are stored in {store.root}; "
                    "run the same command again to finish the rest"
                )
                return stopping.exit_status()
        elif experiment.settings["report"] and outdated(store):
            publish_run(store.root, reporter.say, lambda media: None)
    return conclude(experiment, store, reporter)


def _check(experiment: Experiment, pending: Sequence[Cell]) -> None:
    """Refuse what fits no model or is not there before anything is written, and before weights are loaded."""
    from corematching.evaluation.evaluator import Evaluator  # torch and transformers, seconds to import

    Evaluator(experiment).check_methods(pending)


def _run(experiment: Experiment, pending: Sequence[Cell], store: Store, reporter: Reporter) -> None:
    execute = EXECUTORS[experiment.settings["executor"]["name"]]
    with start_tracking(experiment, reporter.say) as tracker:
        execute(experiment, pending, store, reporter, tracker.log)
        store.refresh()
        if experiment.settings["report"]:
            publish_run(store.root, reporter.say, tracker.log_media)
        tracker.finish(store)


def headline(experiment: Experiment, pending: int) -> Iterator[str]:
    """The first lines of a run: what runs on what, and loudly if that is not the real thing."""
    settings, cells = experiment.settings, len(experiment.mine)
    model, data = settings["model"]["name"], settings["data"]["name"]
    yield from banner(settings)
    share = "" if settings["shard"] is None else f" (shard {settings['shard']} of {settings['shards']})"
    done = f", {cells - pending} already done" if pending < cells else ""
    where = remote.shown(experiment.folder)
    yield f"{experiment.name}: {cells} cells{share} on {model} with {data} data{done} -> {where}"


def conclude(experiment: Experiment, store: Store, reporter: Reporter) -> int:
    """Write and print the table; returns the exit status."""
    read = [(cell, store.read(cell.id)) for cell in experiment.cells]
    # A cell is called what this experiment calls it, whoever computed it.
    records = [record and {**record, "labels": {**record["labels"], **cell.label}} for cell, record in read]
    present = [record for record in records if record is not None]
    counts = sorted({record["n"] for record in present if record["n"]})
    asked = "-".join(str(count) for count in dict.fromkeys((counts[0], counts[-1]))) if counts else "0"
    settings = experiment.settings
    notes = [f"{settings['model']['name']}, data {settings['data']['name']}, {asked} questions per cell"]
    notes += [f"prompt {settings['prompt']}; tokens/layer: visual tokens per decoder layer"]
    notes += ["GFLOPs per question: everything computed, 2 per multiply-add"]
    notes += filter(None, [small_note(settings)])
    names = [benchmark.name for benchmark in experiment.benchmarks]
    table = build_table(records, names, notes, ranked=settings["match"] == "average")
    table.write(store.root)
    show(table, reporter.console)
    reporter.say("table: " + ", ".join(f"{remote.shown(store.root)}/table.{suffix}" for suffix in ("md", "csv")))
    mine = {cell.id for cell in experiment.mine}
    failed = [record for record in present if record["status"] == "failed" and record["id"] in mine]
    if failed:
        reporter.say(f"{len(failed)} of {len(records)} cells failed; tracebacks are in {store.cells}/<id>/cell.json")
        for record in failed if settings["debug"] else ():
            reporter.say(record["error"]["traceback"])
    store.upload()
    return 1 if failed or mine - {record["id"] for record in present} else 0


def prepare_libraries() -> None:
    """Silence what would break into our display, and let idle threads sleep; what the user has set stays.

    Threads that spin while they wait take the cores from everyone else: on a shared machine that halves the speed.
    """
    for name, value in (
        ("OMP_WAIT_POLICY", "PASSIVE"),
        ("TQDM_DISABLE", "1"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TRANSFORMERS_VERBOSITY", "error"),
    ):
        os.environ.setdefault(name, value)
