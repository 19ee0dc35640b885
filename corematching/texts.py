"""Text from outside (labels, questions, answers, paths) made harmless wherever it is shown."""

from __future__ import annotations

import unicodedata

_BREAKS = "\t\n\v\f\r\x85\u2028\u2029"
_JOINERS = "\u200c\u200d"  # part of words and of emoji, harmless by themselves


def neutral(text: str) -> str:
    """`text` in one line, without characters that steer a terminal or the direction of writing.

    Tabs and line breaks become blanks; other control and formatting characters, and halves of surrogate pairs, are
    shown by their escape (``\\x1b``, ``\\u202e``).
    """
    return "".join(map(_shown, text))


def _shown(char: str) -> str:
    if char in _BREAKS:
        return " "
    steers = unicodedata.category(char) in ("Cc", "Cf", "Cs") and char not in _JOINERS
    return char.encode("unicode_escape").decode("ascii") if steers else char
