"""What runs in a Ray actor of ``executor=ray``: one loaded model, which computes the cells it is given."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corematching.evaluation import stopping
from corematching.evaluation.cells import Cell
from corematching.evaluation.experiment import Experiment


class Worker:
    """Computes cells; two further threads answer how far it is, and take the wish to stop.

    Parameters
    ----------
    experiment
        Which cells there are.
    """

    def __init__(self, experiment: Experiment):
        from corematching.evaluation.runner import prepare_libraries

        prepare_libraries()
        self.experiment = experiment
        self._evaluator: Any = None
        self._at: tuple[str, int, int] = ("starting", 0, 0)

    def where(self) -> dict[str, Any]:
        """Who and where this is, and which file its output goes to."""
        import ray

        context = ray.get_runtime_context()
        log = f"worker-{context.get_worker_id()}-*-{os.getpid()}.err"
        try:
            node: Any = ray._private.worker._global_node
            log = str(Path(node.get_logs_dir_path()) / log)
        except AttributeError:
            log = f"<Ray's logs>/{log}"
        return {"pid": os.getpid(), "node": ray.util.get_node_ip_address(), "log": log}

    def load(self) -> None:
        """Load the model.

        Raises
        ------
        UserError
            If it is no good.
        """
        from corematching.evaluation.evaluator import Evaluator

        self._evaluator = Evaluator(self.experiment)
        self._evaluator.prepare()
        self._at = ("", 0, 0)

    def compute(self, company: Sequence[Cell], root: Path, peers: int) -> list[tuple[Cell, dict[str, Any], Any]]:
        """Compute cells that can be answered together; returns those that are done when it ends or is stopped."""
        from corematching.evaluation.attempt import computed

        found = []
        try:
            for done in computed(tuple(company), self.experiment, self._evaluator, self, root, peers):
                found.append(done)
        except stopping.Stopped:
            pass
        self._at = ("", 0, 0)
        return found

    def help(self, root: Path) -> int:
        """Answer questions of others' cells; returns how many shards there were."""
        from corematching.evaluation.executors import help_others

        self._at = ("helping", 0, 0)
        count = help_others(self.experiment, self._evaluator, root)
        self._at = ("", 0, 0)
        return count

    def sees(self, path: Path) -> bool:
        """Whether a file is on this node, too."""
        return path.exists()

    def progress(self) -> tuple[str, int, int]:
        """What it is at: a cell, its questions that are answered, and all of them."""
        return self._at

    def stop(self) -> None:
        """Stop after the batch in flight."""
        stopping.ask()

    # What `computed` tells the progress to.
    def start(self, cell: Cell, company: Sequence[Cell]) -> None:
        """A cell begins."""
        self._at = (str(cell), 0, 0)

    def advance(self, done: int, total: int) -> None:
        """So many questions are answered."""
        self._at = (self._at[0], done, total)
