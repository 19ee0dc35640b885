"""Overlays as they lie beside an experiment's cells: ``overlays.json`` and one PNG per image.

:mod:`corematching.inspection.overlays` records them; the report draws them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEMA = 2
FOLDER = "overlays"
"""Folder within an experiment's."""
FILE = "overlays.json"


def thumbnail_path(folder: Path, benchmark: str, doc_id: int) -> Path:
    """Where the small picture of a question lies, if :mod:`corematching.inspection.thumbnails` has written it."""
    return folder / "thumbnails" / f"{benchmark}-{doc_id}.jpg"


def load(folder: Path) -> dict[str, Any] | None:
    """What was recorded, or ``None`` if there is nothing readable."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        complete = all((folder / example["image"]).is_file() for example in found["examples"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.get("schema") == SCHEMA and complete else None
