"""Figures of what a model does inside: elbow curves, core tokens on the image, matching evidence per layer."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from corematching.inspection.evidence import Evidence, Example, elbow, rank_correlation
from corematching.results.figures import COLOURS, STYLE, new_figure


def elbow_curve(evidence: Evidence, layers: Sequence[int]) -> Figure:
    """Sorted match counts of a few layers, the chord from first to last point, and the point farthest from it."""
    figure = new_figure(2.6 * len(layers) + 0.4, 2.5)
    with mpl.rc_context(STYLE):
        for axes, layer in zip(figure.subplots(1, len(layers), squeeze=False).ravel(), layers, strict=True):
            curve, kept = elbow(evidence.match[layer])
            ends = [0, len(curve) - 1]
            axes.plot(curve, color=COLOURS[0], linewidth=1.4)
            axes.plot(ends, curve[ends], color="#999999", linestyle="--", linewidth=1)
            axes.plot(kept, curve[min(kept, len(curve) - 1)], "o", color=COLOURS[1])
            axes.annotate(f"keeps {kept} of {len(curve)}", (0.05, 0.06), xycoords="axes fraction", fontsize=8)
            axes.set_title(f"layer {layer}", fontsize=9)
            axes.set_xlabel("visual tokens, sorted")
        figure.axes[0].set_ylabel("core neurons activated")
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
    mask = np.zeros(grid[0] * grid[1], dtype=np.uint8)
    mask[np.asarray(kept, dtype=int)] = 255
    size = image.size
    tiles = Image.fromarray(mask.reshape(grid)).resize(size, Image.Resampling.NEAREST)
    faded = Image.blend(image.convert("RGB"), Image.new("RGB", size, "#dcdcdc"), strength)
    return Image.composite(image.convert("RGB"), faded, tiles)


def core_tokens(rows: Sequence[tuple[Example, dict[str, Sequence[int]]]], grid: tuple[int, int]) -> Figure:
    """Kept visual tokens over the image: one line per question, one column per method.

    Parameters
    ----------
    rows
        A question and, by column title, the visual tokens that stay for it. Two questions about one image show that
        the choice follows the question.
    grid
        Rows and columns of patches.
    """
    titles = list(rows[0][1])
    figure = new_figure(1.75 * (len(titles) + 1), 1.95 * len(rows))
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        panels = figure.subplots(len(rows), len(titles) + 1, squeeze=False)
        for line, (example, kept) in zip(panels, rows, strict=True):
            question = example.question.partition("\n")[0]
            pictures = [example.image, *(shade(example.image, kept[title], grid) for title in titles)]
            headings = [question, *(f"{title}: {len(kept[title])}" for title in titles)]
            for place, (axes, picture, heading) in enumerate(zip(line, pictures, headings, strict=True)):
                axes.imshow(picture, interpolation="none")
                axes.set_axis_off()
                axes.set_title(heading, fontsize=6.5, loc="left" if place == 0 else "center", wrap=True)
    return figure


def matching(evidence: Sequence[Evidence], layers: Sequence[int]) -> Figure:
    """Co-activation with the last token against cosine similarity: clouds of a few layers, and correlation by layer."""
    figure = new_figure(2.3 * (len(layers) + 1.25), 2.6)
    with mpl.rc_context(STYLE):
        panels = figure.subplots(1, len(layers) + 1, width_ratios=[*([1.0] * len(layers)), 1.25])
        for axes, layer in zip(panels, layers, strict=False):
            for colour, one in zip(COLOURS, evidence, strict=False):
                axes.scatter(
                    one.cosine[layer],
                    one.coactivation[layer],
                    s=3,
                    alpha=0.4,
                    color=colour,
                    linewidths=0,
                    rasterized=True,
                )
            axes.set_title(f"layer {layer}", fontsize=9)
            axes.set_xlabel("cosine similarity")
        panels[0].set_ylabel("neurons activated together")
        correlation = rank_correlation(evidence)
        last = panels[-1]
        last.plot(correlation.T, color="#bbbbbb", linewidth=0.7)
        last.plot(np.nanmean(correlation, axis=0), color=COLOURS[0], marker="o", markersize=3)
        last.set_ylim(-1.05, 1.05)
        last.axhline(0, color="#999999", linewidth=0.7)
        last.set_title("rank correlation", fontsize=9)
        last.set_xlabel("decoder layer")
    return figure
