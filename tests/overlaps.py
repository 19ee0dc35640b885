"""What a figure draws over what: boxes of its texts, as its renderer lays them out."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox


def drawn_texts(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text that drawing the figure puts on the page, with its box in pixels."""
    with _recorded() as texts:
        figure.draw_without_rendering()
    unique = {id(text): text for text in texts}
    return [(text.get_text(), Text.get_window_extent(text)) for text in unique.values()]


def overlapping(figure: Figure, slack: float = 1.0) -> list[str]:
    """Pairs of texts whose boxes share more than ``slack`` pixels either way, and texts that leave the page."""
    texts = drawn_texts(figure)
    assert texts
    page = figure.bbox
    faults = [
        f"{text!r} leaves the page"
        for text, box in texts
        if box.x0 < page.x0 - slack or box.x1 > page.x1 + slack or box.y0 < page.y0 - slack or box.y1 > page.y1 + slack
    ]
    for (one, a), (other, b) in itertools.combinations(texts, 2):
        across, up = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        if across > slack and up > slack:
            faults.append(f"{one!r} and {other!r} overlap by {across:.0f} x {up:.0f} pixels")
    return faults


@contextmanager
def _recorded():
    """All texts that are drawn meanwhile."""
    texts: list = []
    original = Text.draw

    def draw(self, renderer, *args, **options):
        if self.get_visible() and self.get_text().strip():
            texts.append(self)
        return original(self, renderer, *args, **options)

    Text.draw = draw
    try:
        yield texts
    finally:
        Text.draw = original
