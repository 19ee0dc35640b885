"""``experiment.json`` in an experiment's folder: whose results these are, and in which order tables show them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from corematching import files

FILE = "experiment.json"
UNPLACED = 10**6
"""Place of a line that the experiment does not list (any more): behind those that it lists."""


@dataclass(frozen=True)
class Manifest:
    """What a folder was asked for.

    Attributes
    ----------
    ask
        What decides the table: words of the command line, model and data; see `corematching.evaluation.asks`.
    lines
        (label, keep) of every line, in the order in which the experiment lists them.
    labels
        By cell id: (label, keep) of its line here, whatever it was called when it was computed.
    """

    ask: Mapping[str, Any]
    lines: Sequence[Sequence[Any]] = ()
    labels: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def renamed(self, cell_id: str) -> dict[str, Any]:
        """The method's label and budget of a cell, as this experiment has them; empty for a cell it does not list."""
        return dict(zip(("method", "keep"), self.labels.get(cell_id, ()), strict=False))

    def place(self, label: str, keep: Any) -> int:
        """Where the experiment lists this line, from 0; `UNPLACED` if it does not."""
        wanted = [label, keep]
        return next((place for place, line in enumerate(self.lines) if list(line) == wanted), UNPLACED)

    def write(self, folder: Path) -> None:
        """Publish in `folder`."""
        files.write(folder / FILE, json.dumps(asdict(self), indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest; None where there is none or it cannot be read."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        labels = {cell: [str(label), keep] for cell, (label, keep) in found.get("labels", {}).items()}
        return Manifest(dict(found["ask"]), [list(line) for line in found["lines"]], labels)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
