"""Running text from an installed package, cut into windows of tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from corematching.errors import UserError
from corematching.models.assembled import package_file

_MARKUP = re.compile(r"[*_#]+ ?|[ \t]+$", re.MULTILINE)


@dataclass(frozen=True)
class Protocol:
    """Which windows of a text are run.

    Attributes
    ----------
    windows
        Their number, spread evenly over the text.
    context, tokens
        Of each: tokens that are prefilled, and tokens behind them that are decoded; each decoded token but the last
        predicts its successor.
    """

    windows: int
    context: int
    tokens: int


def read_text(source: Mapping[str, Any]) -> str:
    """The text of a ``text`` configuration, without the signs of Markdown.

    Raises
    ------
    UserError
        If the package or the file is not there.
    """
    raw = package_file(source["package"], source["file"], "make smol").read_text(encoding="utf-8")
    return re.sub(r"\n{3,}", "\n\n", _MARKUP.sub("", raw))


def windows_of(ids: list[int], protocol: Protocol) -> list[list[int]]:
    """Token ids of the windows, ``context + tokens`` each.

    Raises
    ------
    UserError
        If they would overlap.
    """
    size = protocol.context + protocol.tokens
    if protocol.windows * size > len(ids):
        raise UserError(
            f"text.windows={protocol.windows} is not valid: the text has {len(ids)} tokens, give at most "
            f"{len(ids) // size} windows of {size}"
        )
    step = (len(ids) - size) / max(1, protocol.windows - 1)
    starts = [int(step * index) for index in range(protocol.windows)]
    return [ids[start : start + size] for start in starts]
