"""Texts in figures: any name can be shown, none is cut in a way that makes two alike, and widths are measured."""

from __future__ import annotations

import hashlib
import unicodedata
from functools import cache

from matplotlib import font_manager
from matplotlib.font_manager import FontProperties
from matplotlib.ft2font import FT2Font
from matplotlib.textpath import text_to_path

from corematching.results.tables import budget
from corematching.texts import neutral

#: The first is bundled with matplotlib; the others are used where the machine has them, for scripts it lacks.
WANTED = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans", "Noto Sans Symbols2")
LONGEST = 90


@cache
def families() -> list[str]:
    """Font families to ask for, in order; only such as exist here, or matplotlib would warn."""
    installed = set(font_manager.get_font_names())
    return [name for name in WANTED if name in installed]


def shown(text: object) -> str:
    """A text in one line, with a replacement character for what no font here can draw."""
    line = " ".join(neutral(str(text)).split())
    return "".join(char if _drawable(char) else "\N{REPLACEMENT CHARACTER}" for char in line)


def name_of(label: str, keep: object = None) -> str:
    """A method's label and, if given, its budget. A label longer than :data:`LONGEST` loses its middle.

    What is lost is replaced by a few digits of its hash, so that two long labels never read alike.
    """
    line = shown(label)
    if len(line) > LONGEST:
        digest = hashlib.sha256(label.encode()).hexdigest()[:4]
        line = f"{line[: LONGEST * 6 // 10]}…{digest}…{line[-LONGEST * 3 // 10 :]}"
    # What belongs to a label's end stays in its last line.
    return line if keep is None or keep != keep else f"{line}\N{NO-BREAK SPACE}·\N{NO-BREAK SPACE}{budget(keep)}"


def wrapped(text: str, inches: float, size: float) -> str:
    """A text broken into lines of at most ``inches`` at a font of ``size`` points, between words where possible."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and width(longer, size) > inches:
                lines.append(line)
                longer = word
            # A word that is wider than the line is broken where it must be.
            while width(longer, size) > inches and len(longer) > 1:
                fits = max(1, next((n for n in range(len(longer), 0, -1) if width(longer[:n], size) <= inches), 1))
                lines.append(longer[:fits])
                longer = longer[fits:]
            line = longer
        lines.append(line)
    return "\n".join(lines)


@cache
def width(line: str, size: float) -> float:
    """The width of one line in inches."""
    properties = FontProperties(family=families(), size=size)
    # A little more than measured: hinting makes drawn letters wider than their outlines.
    return 1.04 * text_to_path.get_text_width_height_descent(line, properties, ismath=False)[0] / 72


@cache
def _drawable(char: str) -> bool:
    # Marks that only join or direct others are drawn with nothing.
    return unicodedata.category(char) in ("Cf", "Zs") or any(font.get_char_index(ord(char)) for font in _fonts())


@cache
def _fonts() -> list[FT2Font]:
    return [font_manager.get_font(font_manager.findfont(FontProperties(family=name))) for name in families()]
