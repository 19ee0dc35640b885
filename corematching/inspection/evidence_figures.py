"""Figures of what a model does inside: elbow curves, core tokens on the image, matching evidence per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from corematching.inspection.evidence import Evidence, Example, Kept, elbow, rank_correlation
from corematching.results.figures.about import About
from corematching.results.figures.canvas import SOFT, STYLE, ShownFigure, finish, new_figure
from corematching.results.figures.looks import MARKERS, look_of
from corematching.results.figures.text import shown, wrapped

EDGE = "#D55E00"
FADED = "#dcdcdc"
PICTURE = 1.75
"""Side of a picture in inches."""


def elbow_curve(evidence: Evidence, layers: Sequence[int]) -> ShownFigure:
    """Sorted match counts of a few layers, the chord from first to last point, and the point farthest from it."""
    figure = new_figure(max(2.6 * len(layers) + 0.4, 5.4), 2.4)
    colour = look_of("core_tokens")["color"]
    with mpl.rc_context(STYLE):
        for axes, layer in zip(figure.subplots(1, len(layers), squeeze=False).ravel(), layers, strict=True):
            curve, kept = elbow(evidence.match[layer])
            ends = [0, len(curve) - 1]
            (line,) = axes.plot(curve, color=colour, linewidth=1.6)
            (chord,) = axes.plot(ends, curve[ends], color=SOFT, linestyle="--", linewidth=1)
            (cut,) = axes.plot(kept, curve[min(kept, len(curve) - 1)], "o", color="#111111", markersize=5)
            axes.set_title(f"layer {layer}: keeps {kept} of {len(curve)}", fontsize=9)
            axes.set_xlabel("visual tokens, sorted")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.axes[0].set_ylabel("core neurons activated")
    entries = [(line, "core neurons of the sentence that a token activates"), (chord, "chord between the ends")]
    asked = f"question: {shown(evidence.question)}" if evidence.question else ""
    finish(figure, evidence.about.adding(asked), [*entries, (cut, "elbow: farthest from the chord")])
    return figure


def shade(image: Image.Image, kept: Sequence[int], grid: tuple[int, int], strength: float = 0.78) -> Image.Image:
    """The image with the patches that are not ``kept`` faded to light grey.

    Parameters
    ----------
    image
        Any size; patches are its equal tiles.
    kept
        Original indices of the visual tokens that stay, row by row.
    grid
        Rows and columns of patches.
    strength
        0 leaves dropped patches as they are, 1 hides them.
    """
    size = image.size
    tiles = Image.fromarray((255 * _mask(kept, grid)).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    faded = Image.blend(image.convert("RGB"), Image.new("RGB", size, FADED), strength)
    return Image.composite(image.convert("RGB"), faded, tiles)


def core_tokens(rows: Sequence[tuple[Example, Mapping[str, Kept]]], grid: tuple[int, int], about: About) -> ShownFigure:
    """Kept visual tokens over the image and the answers given: one line per question, one column per method.

    Parameters
    ----------
    rows
        A question and, by column title, what stays for it (see :func:`corematching.inspection.evidence.answered`). Two
        questions about one image show that the choice follows the question.
    grid
        Rows and columns of patches.
    about
        What the figure carries (see :func:`corematching.inspection.evidence.about_model`).
    """
    methods = list(rows[0][1])
    headings = [_headings(example, kept) for example, kept in rows]
    lines = [max(text.count("\n") + 1 for text in line) for line in headings]
    figure = new_figure((PICTURE + 0.12) * (len(methods) + 1), sum(PICTURE + 0.12 + 0.14 * count for count in lines))
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        panels = figure.subplots(len(rows), len(methods) + 1, squeeze=False)
        for line, (example, kept), texts in zip(panels, rows, headings, strict=True):
            for axes, text in zip(line, texts, strict=True):
                axes.set_axis_off()
                # The layout reserves room for a title over the panel, not over a smaller picture inside it.
                axes.set_anchor("N")
                axes.set_title(text, fontsize=7, loc="left", pad=3)
            line[0].imshow(example.image, interpolation="none")
            for axes, method in zip(line[1:], methods, strict=True):
                axes.imshow(shade(example.image, kept[method].tokens, grid), interpolation="none")
                _outline(axes, kept[method].tokens, grid, example.image.size)
    key = [
        (Patch(facecolor="white", edgecolor=EDGE, linewidth=1), "visual tokens that stay"),
        (Patch(facecolor=FADED), "faded: dropped"),
        (Line2D([], [], linestyle="none", marker="$✓$", color="#111111"), "the expected answer (✗: another)"),
    ]
    finish(figure, about, key)
    return figure


def _headings(example: Example, kept: Mapping[str, Kept]) -> list[str]:
    """What stands over the pictures of one question: the question itself, then each method's count and answer."""
    question = shown(example.question.partition("\n")[0])
    texts = [f"{question}\nexpected: {shown(example.target)}"]
    for method, one in kept.items():
        mark = "✓" if one.answer.strip().lower() == example.target.strip().lower() else "✗"
        texts.append(f"{shown(method)}: {len(one.tokens)} stay\n{mark} {shown(one.answer)[:80]}")
    return [wrapped(text, PICTURE - 0.05, 7) for text in texts]


def _mask(kept: Sequence[int], grid: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(grid[0] * grid[1], dtype=bool)
    mask[np.asarray(kept, dtype=int)] = True
    return mask.reshape(grid)


def _outline(axes: Axes, kept: Sequence[int], grid: tuple[int, int], size: tuple[int, int]) -> None:
    """A line around the patches that stay: on a grey image fading alone is hard to see."""
    mask = np.pad(_mask(kept, grid), 1)
    height, width = size[1] / grid[0], size[0] / grid[1]
    across, down = np.argwhere(mask[1:] != mask[:-1]), np.argwhere(mask[:, 1:] != mask[:, :-1])
    segments = [[((x - 1) * width, y * height), (x * width, y * height)] for y, x in across]
    segments += [[(x * width, (y - 1) * height), (x * width, y * height)] for y, x in down]
    lines = [[(x - 0.5, y - 0.5) for x, y in segment] for segment in segments]
    axes.add_collection(LineCollection(lines, colors=EDGE, linewidths=0.6))


def matching(evidence: Sequence[Evidence], layers: Sequence[int]) -> ShownFigure:
    """Co-activation with the last token against cosine similarity: clouds of a few layers, and correlation by layer."""
    figure = new_figure(2.3 * (len(layers) + 1.25), 2.6)
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(evidence)))
    entries = []
    with mpl.rc_context(STYLE):
        panels = figure.subplots(1, len(layers) + 1, width_ratios=[*([1.0] * len(layers)), 1.25])
        correlation = rank_correlation(evidence)
        for place, (one, colour) in enumerate(zip(evidence, colours, strict=True)):
            dots = {"marker": MARKERS[place % len(MARKERS)], "color": colour, "linestyle": "none", "markersize": 2.2}
            dots |= {"alpha": 0.45, "markeredgewidth": 0, "rasterized": True}
            for axes, layer in zip(panels, layers, strict=False):
                axes.plot(one.cosine[layer], one.coactivation[layer], **dots)
            panels[-1].plot(correlation[place], color=colour, linewidth=0.8)
            name = shown(one.question) or f"question {place + 1}"
            entries.append((Line2D([], [], **{**dots, "alpha": 1, "markersize": 5}), name))
        for axes, layer in zip(panels, layers, strict=False):
            axes.set_title(f"layer {layer}", fontsize=9)
            axes.set_xlabel("cosine similarity")
            axes.locator_params(nbins=4)
        panels[0].set_ylabel("neurons activated together")
        (mean,) = panels[-1].plot(np.nanmean(correlation, axis=0), color="#111111", linewidth=1.8)
        panels[-1].axhline(0, color="#999999", linewidth=0.7)
        panels[-1].set(title="rank correlation", xlabel="decoder layer", ylim=(-1.05, 1.05))
        panels[-1].title.set_fontsize(9)
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    about = evidence[0].about.adding(f"n = {len(evidence)} questions, a dot per visual token")
    finish(figure, about, [*entries, (mean, "mean over questions")])
    return figure
