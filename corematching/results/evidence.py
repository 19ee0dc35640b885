"""The fault scripts beside this project import examples from here; their home is `corematching.inspection.evidence`."""

from typing import Any


def __getattr__(name: str) -> Any:
    from corematching.inspection import evidence

    return getattr(evidence, name)
