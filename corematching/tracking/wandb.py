"""Weights & Biases: one run per experiment folder, continued when the sweep is resumed.

Whatever goes wrong here (wandb missing, no network, a full disk) is said once and otherwise ignored: the store is the
record, wandb a copy.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corematching import files

if TYPE_CHECKING:
    from corematching.evaluation.cells import Cell


class Tracker:
    """Logs cells to a wandb run; does nothing without one.

    Parameters
    ----------
    run
        An initialised wandb run, or None.
    say
        Called with the one line that tells about the first failure.
    """

    def __init__(self, run: Any, say: Callable[[str], None]):
        self._run, self._say = run, say

    def log(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """Log one finished cell: its score over keep, and what really ran."""
        self._guard(lambda run: run.log(cell_metrics(record)))

    def log_media(self, make: Callable[[], Mapping[str, Any]]) -> None:
        """Log what `make` returns, by name: tables, figures or anything else wandb takes. Called only with a run."""
        self._guard(lambda run: run.log(dict(make())))

    def finish(self, store: Any) -> None:
        """Attach the store's records and close the run."""

        def end(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(f"{run.group}-store", type="results")
            for path in sorted(store.cells.glob("*/*")):
                artifact.add_file(str(path), name=f"{path.parent.name}/{path.name}")
            run.log_artifact(artifact)
            run.finish()

        self._guard(end)

    def _guard(self, action: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # tracking must not cost a result
            self._run = None
            self._say(f"tracking stopped ({type(error).__name__}: {' '.join(str(error).split())[:200]}); results go on")


@contextmanager
def start_tracking(experiment: Any, say: Callable[[str], None]) -> Iterator[Tracker]:
    """Open the experiment's wandb run as ``tracking=`` asks, or say in one line why there is none."""
    settings = experiment.settings["tracking"]
    run = None
    if settings["mode"]:
        try:
            run = _open_run(experiment, settings)
        except Exception as error:  # tracking must not cost a result
            say(f"no tracking ({type(error).__name__}: {' '.join(str(error).split())[:200]}); results go on")
    tracker = Tracker(run, say)
    try:
        yield tracker
    finally:
        if tracker._run is not None:
            tracker._guard(lambda run: run.finish())


def _open_run(experiment: Any, settings: Mapping[str, Any]) -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    run = wandb.init(
        project=settings["project"],
        entity=settings["entity"],
        group=settings["group"] or experiment.name,
        name=experiment.name,
        id=_run_id(experiment.folder),
        resume="allow",
        mode=settings["mode"],
        dir=str(experiment.folder),
        config=dict(experiment.settings),
        settings=wandb.Settings(console="off", init_timeout=30),
    )
    run.define_metric("keep")
    run.define_metric("*", step_metric="keep")
    return run


def _run_id(folder: Path) -> str:
    """The id of this experiment folder's run: made once, then read, so that a resumed sweep continues the same run."""
    path = folder / "wandb" / "run_id"
    if not path.exists():
        files.write(path, secrets.token_hex(6))
    return path.read_text().strip()


def cell_metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    """What wandb plots of a cell: numbers named ``<benchmark>/<method>/<what>``, with ``keep`` as their x-axis."""
    label = record["labels"]
    prefix = f"{label['benchmark']}/{label['method']}"
    score, trace = record.get("score") or {}, record.get("trace") or {}
    numbers = {
        f"{prefix}/{score.get('metric', 'score')}": score.get("value"),
        f"{prefix}/visual_tokens_per_layer": trace.get("visual_tokens_per_layer"),
        f"{prefix}/kv_bytes": trace.get("kv_bytes"),
        f"{prefix}/prefill_flops": (trace.get("flops") or {}).get("prefill"),
        f"{prefix}/failed": float(record["status"] == "failed"),
    }
    keep = label["keep"] if label["keep"] is not None else trace.get("visual_tokens_per_layer")
    return {"keep": keep, **{name: value for name, value in numbers.items() if value is not None}}
