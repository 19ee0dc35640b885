"""One look per method: the colour and marker it has in every figure and in the report.

A look follows from the method's name alone, so that two figures, or two experiments, can be read side by side. Neither
colours nor markers alone would tell thirty methods apart; their pairs do.
"""

from __future__ import annotations

import hashlib

import pandas as pd

from corematching.results.accuracy import CONTROLS

GREYED = tuple(dict.fromkeys([*CONTROLS, "random_neurons"]))
"""Methods that are controls, whatever they act on."""

#: Okabe and Ito's colours that are dark enough for a white page, and a wine red: they stay apart for every kind of
#: colour-blindness (a test simulates three).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
GREYS = ("#8A8A8A", "#5F5F5F", "#B0B0B0")
DENSE = "#111111"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "d")
#: What Plotly calls the same markers.
SYMBOLS = {
    **{"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross"},
    **{"X": "x", "<": "triangle-left", ">": "triangle-right", "d": "diamond-tall", "*": "star"},
}
#: Methods with a place of their own: those that often stand in one figure lie close together, as neighbours differ in
#: both colour and marker. New names go to the end; others get a place by their name's hash.
KNOWN = (
    *("corematching", "core_tokens", "core_neurons", "fastv", "sparsevlm", "pyramiddrop", "visionzip", "cdpruner"),
    *("divprune", "dart", "prumerge", "prumerge_plus", "fastervlm", "vtc_cls", "tome", "tome_pre_llm", "topv", "csp"),
    *("sgl", "h2o", "snapkv", "streaming_llm", "coreinfer", "wanda_neurons", "dejavu", "powerinfer"),
    *("corematching_release", "pyramidkv", "adakv", "refreshkv", "actqkv", "attention_predictor", "pod"),
    *("as_vit", "focusllava"),
)

# Seven colours and ten markers have no common divisor: counting both up together meets every pair once.
_COLOURED = [(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i in range(len(COLOURS) * len(MARKERS))]
_GREY = [(GREYS[i % len(GREYS)], MARKERS[i % len(MARKERS)]) for i in range(len(GREYS) * len(MARKERS))]
_BLACK = [(DENSE, marker) for marker in ("*", *MARKERS)]


def styles(rows: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Colour and marker of every label, as matplotlib's arguments.

    Parameters
    ----------
    rows : pandas.DataFrame
        With columns ``method`` (the label) and ``method_name``. Dense is black, controls are grey.

    Returns
    -------
    dict
        By label: ``color`` and ``marker``. A label that is no method's own name gets a place by its hash; only if two
        such labels meet in one place does the second, by name, take the next one.
    """
    pairs = sorted(set(zip(rows["method"], rows["method_name"], strict=True)), key=lambda pair: (_other(*pair), pair))
    chosen: dict[str, dict[str, str]] = {}
    taken: set[tuple[str, str]] = set()
    for label, name in pairs:
        pool, own = _pool(name)
        start = own.index(name) if not _other(label, name) else _hashed(label, len(own), len(pool))
        places = [*pool[start:], *pool[len(own) : start]]
        place = next((place for place in places if place not in taken), pool[start])
        taken.add(place)
        chosen[label] = dict(zip(("color", "marker"), place, strict=True))
    return chosen


def look_of(name: str) -> dict[str, str]:
    """Colour and marker of one method under its own name."""
    return styles(pd.DataFrame({"method": [name], "method_name": [name]}))[name]


def _pool(name: str) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """Places for methods like this one, and the names that the first of them belong to."""
    if name == "dense":
        return _BLACK, ("dense",)
    return (_GREY, GREYED) if name in GREYED else (_COLOURED, KNOWN)


def _other(label: str, name: str) -> bool:
    """Whether a label is not the plain name of a method with a place of its own."""
    return label != name or name not in _pool(name)[1]


def _hashed(label: str, first: int, end: int) -> int:
    return first + int.from_bytes(hashlib.sha256(label.encode()).digest()[:4], "big") % (end - first)
