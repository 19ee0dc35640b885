"""The fault scripts beside this project import prompts from here; their home is :mod:`corematching.answering`."""

from typing import Any


def __getattr__(name: str) -> Any:
    from corematching.answering import conversation

    return getattr(conversation, name)
