"""The page that figures are drawn on: house style, bands for legend, caption and banner, files.

Legend, caption and banner get bands of their own above and below the panels, as high as they need: nothing is ever
drawn over a curve, whatever its name and however many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from corematching import files
from corematching.results.figures.about import About
from corematching.results.figures.text import families, wrapped

STYLE: Any = {  # matplotlib types the keys of such dictionaries, one by one
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "font.family": families(),
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    # TrueType: journals refuse the Type 3 fonts that are matplotlib's default.
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    # A dollar sign in a label is a dollar sign.
    "text.parse_math": False,
}
WARNING = "#a3282d"
SOFT = "#5b6470"
_GAP = 0.07  # inches between bands


class ShownFigure(Figure):
    """A figure that is shown and saved in the house style, in notebooks, too, without pyplot."""

    about = About("", "")

    def savefig(self, *args: Any, **options: Any) -> None:
        """Save in the house style: the kind of fonts in a PDF is decided here, not when the figure is drawn."""
        with mpl.rc_context(STYLE):
            super().savefig(*args, **options)

    def _repr_png_(self) -> bytes:
        return png(self)


def new_figure(width: float, height: float) -> ShownFigure:
    """An empty figure in the house style, with a canvas of its own (no window, no global state)."""
    with mpl.rc_context(STYLE):
        figure = ShownFigure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
    return figure


def finish(figure: ShownFigure, about: About, entries: Sequence[tuple[Artist, str]] = (), size: float = 8) -> None:
    """Add legend, caption and banner; the figure grows by the height that they need.

    Parameters
    ----------
    figure
        With all its panels drawn; its height so far is theirs.
    about
        What it carries.
    entries
        Handles and names of the legend; of entries with one name the first counts.
    size
        Points of the legend's letters.
    """
    figure.about = about
    across, body = figure.get_figwidth(), figure.get_figheight()
    with mpl.rc_context(STYLE):
        caption = _line(figure, about.caption, across, size=6, color=SOFT)
        banner = _line(figure, about.banner, across, size=7, color=WARNING)
        legend = _legend(figure, entries, across, size)
    below = [_height(figure, artist) for artist in (caption, legend)]
    above = _height(figure, banner)
    whole = body + sum(below) + above
    figure.set_figheight(whole)
    if caption:
        caption.set_position((_GAP / across, _GAP / whole))
    if legend:
        legend.set_bbox_to_anchor((0.5, below[0] / whole), transform=figure.transFigure)
    if banner:
        banner.set(position=(_GAP / across, 1 - _GAP / whole), va="top")
    with mpl.rc_context(STYLE):
        ConstrainedLayoutEngine(rect=(0, sum(below) / whole, 1, body / whole)).execute(figure)
    # Laid out once: doing it again for every file would take most of the time of saving.
    figure.set_layout_engine("none")


def hollow(look: dict[str, str], **more: Any) -> dict[str, Any]:
    """Arguments of a line whose markers hide nothing behind them."""
    return {"linewidth": 1.1, "markersize": 6, "markerfacecolor": "none", "markeredgewidth": 1.3, **look, **more}


def key(look: dict[str, str], **more: Any) -> Line2D:
    """A legend's handle for a method."""
    return Line2D([], [], **hollow(look, **more))


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``<name>.pdf`` and ``<name>.png``, with what the figure carries in their metadata, but no dates."""
    about = getattr(figure, "about", About("", ""))
    pdf = {"Title": name, "Subject": about.caption, "Keywords": " ".join([about.details, about.banner]).strip()}
    metadata = {
        "pdf": {"CreationDate": None, "Producer": None, "Creator": None, **pdf},
        "png": _png_metadata(figure),
    }
    paths = [folder / f"{name}.{suffix}" for suffix in metadata]
    for path, facts in zip(paths, metadata.values(), strict=True):
        with files.replacing(path) as temporary:
            figure.savefig(temporary, metadata=facts)
    return paths


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as a PNG, for pages and trackers."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata=_png_metadata(figure))
    return buffer.getvalue()


def _png_metadata(figure: Figure) -> dict[str, str | None]:
    about = getattr(figure, "about", About("", ""))
    texts = {"Description": about.caption, "Source": about.details, "Warning": about.banner}
    return {"Software": None, **{name: text for name, text in texts.items() if text}}


def _line(figure: Figure, text: str, across: float, size: float, color: str) -> Any:
    """A text over the figure's width, still without a place; ``None`` if there is none."""
    if not text:
        return None
    broken = wrapped(text, across - 2 * _GAP, size)
    return figure.text(0, 0, broken, fontsize=size, color=color, ha="left", va="bottom", linespacing=1.25)


def _legend(figure: Figure, entries: Sequence[tuple[Artist, str]], across: float, size: float) -> Any:
    """A legend in as many columns as fit."""
    first: dict[str, Artist] = {}
    for handle, name in entries:
        first.setdefault(name, handle)
    if not first:
        return None
    names = [wrapped(name, min(2.4, across - 1), size) for name in first]
    for columns in range(min(len(names), 8), 0, -1):
        options = {"ncols": columns, "fontsize": size, "borderaxespad": 0.3, "columnspacing": 1.2}
        legend = figure.legend(list(first.values()), names, loc="lower center", **options)
        if columns == 1 or legend.get_window_extent().width <= (across - _GAP) * figure.dpi:
            break
        legend.remove()
    legend.set_in_layout(False)
    return legend


def _height(figure: Figure, artist: Any) -> float:
    """How much of the figure's height an artist needs, in inches, with the gap beside it."""
    return artist.get_window_extent().height / figure.dpi + _GAP + 0.02 if artist else 0.0
