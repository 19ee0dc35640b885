"""Which questions run together: those about one picture first, up to a budget of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Asked:
    """What batching needs to know of a question."""

    settings: Any
    """Questions of one batch share these (hashable) generation settings."""
    pictures: tuple[str, ...]
    """Its pictures, by content."""
    tokens: int
    """Length of its prompt, visual tokens included."""


def plan(asked: Sequence[Asked], most_rows: int, most_tokens: int) -> list[list[int]]:
    """Part questions into batches.

    Questions with as many pictures and the same settings run together, those about the same pictures side by side and,
    if one batch can hold them, in one batch; the longest first, so that batches pad little and memory peaks at the
    start.

    Parameters
    ----------
    asked
        The questions.
    most_rows
        Most questions of a batch.
    most_tokens
        Most prompt tokens of a batch, padding included (one question may exceed it).

    Returns
    -------
    Indices, batch by batch; every question is in exactly one.
    """
    about: dict[tuple, list[int]] = {}
    for index, question in enumerate(asked):
        about.setdefault((question.settings, question.pictures), []).append(index)
    for group in about.values():
        group.sort(key=lambda index: (-asked[index].tokens, index))
    kinds: dict[tuple, list[list[int]]] = {}
    for (settings, pictures), group in about.items():
        kinds.setdefault((settings, len(pictures)), []).append(group)
    batches: list[list[int]] = []
    for groups in kinds.values():
        groups.sort(key=lambda group: (-asked[group[0]].tokens, group[0]))
        batch: list[int] = []
        for group in groups:
            whole = _fits(asked, group, most_rows, most_tokens)
            for place, index in enumerate(group):
                together = group if whole and place == 0 else [index]
                if batch and not _fits(asked, [*batch, *together], most_rows, most_tokens):
                    batches.append(batch)
                    batch = []
                batch.append(index)
        batches.append(batch)
    return batches


def _fits(asked: Sequence[Asked], batch: Sequence[int], most_rows: int, most_tokens: int) -> bool:
    """Whether so many questions may run together."""
    return len(batch) <= most_rows and len(batch) * max(asked[index].tokens for index in batch) <= most_tokens
