"""lmms-eval, imported without what the import does to the host program.

``import lmms_eval.models`` removes all log sinks of the process and adds one of its own. Here both calls are switched
off during the import, and lmms-eval's log and its progress bars are silenced: what matters in them reaches the user as
an error. The import also tells PIL to fill up truncated images with grey; a broken file must be an error instead.
"""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any
from unittest.mock import patch

from loguru import logger
from PIL import ImageFile

with patch.object(type(logger), "remove"), patch.object(type(logger), "add"):
    import_module("lmms_eval.evaluator")
ImageFile.LOAD_TRUNCATED_IMAGES = False
for name in ("lmms_eval", "utils"):  # task files run as top-level modules called utils
    logger.disable(name)

task_module: Any = import_module("lmms_eval.api.task")
task_module.tqdm = functools.partial(task_module.tqdm, disable=True)  # a bar per task, over the host's own

tasks: Any = import_module("lmms_eval.tasks")
ConfigurableTask = task_module.ConfigurableTask
