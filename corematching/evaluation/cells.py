"""A cell: one method at one budget on one benchmark with one model, identified by its content."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from corematching.results.seal import canonical_json, identity


@dataclass(frozen=True)
class Cell:
    """The unit of work, of storage and of resuming.

    Two cells are the same exactly if their configurations are; labels say how to print a cell and do not count.

    Parameters
    ----------
    canonical
        Canonical JSON of the resolved configuration; see `Cell.of`.
    labels
        (name, value) pairs for tables: model, method, keep, benchmark, data.
    """

    canonical: str
    labels: tuple[tuple[str, Any], ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, config: Mapping[str, Any], **labels: Any) -> "Cell":
        """Freeze a configuration of plain JSON values."""
        return cls(canonical_json(config), tuple(labels.items()))

    @property
    def id(self) -> str:
        """First 16 hex digits of the SHA-256 of the configuration."""
        return identity(self.canonical)

    @property
    def config(self) -> dict[str, Any]:
        """A fresh copy of the configuration."""
        return json.loads(self.canonical)

    @property
    def label(self) -> dict[str, Any]:
        """The labels as a dictionary."""
        return dict(self.labels)

    def __str__(self) -> str:
        label = self.label
        keep = "" if label.get("keep") is None else f" keep={label['keep']}"
        return f"{label.get('benchmark')} · {label.get('method')}{keep}"
