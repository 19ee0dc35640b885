"""The figure of a long-decode run: four quantities over the context's length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import pandas as pd

from corematching.longdecode.table import MASS, READ, TIME
from corematching.results.figures.about import About, is_bundled
from corematching.results.figures.canvas import STYLE, ShownFigure, finish, hollow, key, new_figure
from corematching.results.figures.looks import styles
from corematching.results.figures.text import name_of
from corematching.results.tables import MINI_BANNER

PANELS = (
    (READ.key, "KV rows read per step", 1.0),
    (MASS.key, "% of dense attention covered", MASS.factor),
    ("agreement", "% of tokens as dense says them", 1.0),
    (TIME.key, "decode ms/token", 1.0),
)


def long_decode_figure(records: Sequence[Mapping[str, Any]]) -> ShownFigure | None:
    """One panel per quantity, one line per method and budget; None if there is nothing to draw."""
    if not records:
        return None
    table = pd.DataFrame(
        {
            "method": record["labels"]["method"],
            "method_name": record["config"]["method"]["name"],
            "keep": record["labels"]["keep"],
            "agreement": record["score"]["value"],
            **record["metrics"],
        }
        for record in records
    )
    look = styles(table)
    figure = new_figure(7.2, 5.2)
    lines = list(table.groupby(["method", "keep"], sort=False, dropna=False))
    with mpl.rc_context(STYLE):
        for axes, (column, title, factor) in zip(figure.subplots(2, 2).ravel(), PANELS, strict=True):
            for (method, _), rows in lines:
                ordered = rows.sort_values("context")
                axes.plot(ordered["context"], factor * ordered[column], **hollow(look.get(method, {})))
            axes.set_xlabel("tokens of context")
            axes.set_ylabel(title)
            axes.set_ylim(bottom=0)
    entries = [
        (key(look.get(method, {})), name_of(method, None if pd.isna(keep) else keep)) for (method, keep), _ in lines
    ]
    model = records[0]["labels"]["model"]
    hardware = records[0]["provenance"]["hardware"]
    caption = f"{model}, {hardware['gpu'] or hardware['cpu']}. Steps are fed the dense answer; time is the median."
    banner = MINI_BANNER if is_bundled(records[0]["config"]["model"]) else ""
    finish(figure, About(caption, "", banner), entries)
    return figure
