"""lmms-eval, imported without what the import does to the host program.

``import lmms_eval.models`` removes all log sinks of the process and adds one of its own. Here both calls are switched
off during the import, and lmms-eval's log is silenced: what matters in it reaches the user as an error.
"""

from __future__ import annotations

from importlib import import_module
from unittest.mock import patch

from loguru import logger

with patch.object(type(logger), "remove"), patch.object(type(logger), "add"):
    import_module("lmms_eval.evaluator")
for name in ("lmms_eval", "utils"):  # task files run as top-level modules called utils
    logger.disable(name)

tasks = import_module("lmms_eval.tasks")
ConfigurableTask = import_module("lmms_eval.api.task").ConfigurableTask
