"""Where processes that share a store offer each other shards of questions: files in ``<store>/shards``.

What is done with them is told in `corematching.evaluation.shards`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from corematching import files
from corematching.results.claims import Claims

_OFFER = "offer.json"


@dataclass(frozen=True)
class Offer:
    """Shards of a company of cells, as helpers find them."""

    folder: Path
    cells: tuple[str, ...]
    """Their ids, in the order of the answers."""
    parts: int
    """Shards that the questions are split into."""


class Board:
    """Where processes that share a store offer and find shards.

    Parameters
    ----------
    root
        The store's folder.
    """

    def __init__(self, root: Path):
        self.folder = root / "shards"
        self._claims = Claims(self.folder)

    @contextmanager
    def offering(self, cells: Sequence[str], parts: int) -> Iterator[Offer]:
        """Offer the shards of cells, given by their ids, for as long as the block lasts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(" ".join(cells).encode()).hexdigest()[:16]
        with self._claims.claim(name):
            folder = self.folder / name
            files.remove(folder)  # left by a process that is gone; perhaps of other code
            files.write(folder / _OFFER, json.dumps({"cells": list(cells), "parts": parts}))
            try:
                yield Offer(folder, tuple(cells), parts)
            finally:
                with suppress(OSError):
                    files.remove(folder)

    def offers(self) -> Iterator[Offer]:
        """What others offer now."""
        for path in sorted(self.folder.glob(f"*/{_OFFER}")):
            try:
                said = json.loads(path.read_text(encoding="utf-8"))
                offer = Offer(path.parent, tuple(map(str, said["cells"])), int(said["parts"]))
            except (OSError, ValueError, LookupError, TypeError):
                continue  # withdrawn at this moment
            with self._claims.claim(path.parent.name) as abandoned:
                if abandoned:
                    with suppress(OSError):
                        files.remove(path.parent)
                    continue
            yield offer
