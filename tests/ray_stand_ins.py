"""Workers of ``executor=ray`` without a model; apart from the tests, whose imports would take them seconds."""

import os
import signal
import sys
from pathlib import Path

from corematching.evaluation import ray_worker

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import chaos_stand_in


class Quick(ray_worker.Worker):
    """Answers with the stand-in of scripts/chaos.py."""

    def load(self):
        self._evaluator = chaos_stand_in.Evaluator(self.experiment)


class Deadly(Quick):
    """Is killed by every cell of one method."""

    def start(self, cell, company):
        if cell.label["method"] == os.environ["CM_TEST_KILLER"]:
            os.kill(os.getpid(), signal.SIGKILL)
