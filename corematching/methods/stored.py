"""Reading small trained parts that methods bring along or are given."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch


def stored(path: Path, entry: str) -> Any:
    """What a file of ``torch.save`` holds by a name, on the CPU.

    Raises
    ------
    ValueError
        In one line, if there is no such file, it is of another kind, or it has no such entry.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)[entry]
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, EOFError, pickle.PickleError) as error:
        raise ValueError(str(error).partition("\n")[0]) from error
