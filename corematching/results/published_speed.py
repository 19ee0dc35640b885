"""Published speed-ups beside predicted or measured ones, and where the differences come from.

The published figures are in ``results/reference/speed``; ``certainty`` says whether the authors state them ("stated") or
somebody else's notes on the paper do ("secondary", never called the paper's own).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from corematching.results.columns import EFFICIENCY
from corematching.results.reference import FOLDER, read_sourced
from corematching.results.tables import Column, Row, Table, budget, mark, number, word

COLUMNS = ("method", "device", "quantity", "value", "statement", "certainty", "source")
CERTAINTY = ("stated", "secondary")
QUANTITIES = {what.key: what for what in EFFICIENCY}


def load_published_speed(folder: Path = FOLDER / "speed") -> pd.DataFrame:
    """All rows of ``*.csv`` in a folder, with columns :data:`COLUMNS`.

    Raises
    ------
    UserError
        If a file lacks a column, or a row has no source, an unknown quantity or certainty, or no number.
    """
    wrong = (
        "is not valid: every row needs a number, a source, a quantity of the efficiency table and a certainty "
        f"({' or '.join(CERTAINTY)})"
    )
    return read_sourced(folder, COLUMNS, wrong, _known)


def _known(frame: pd.DataFrame) -> pd.Series:
    """Which rows are of a known quantity and certainty."""
    return frame["quantity"].isin(QUANTITIES.keys()) & frame["certainty"].isin(CERTAINTY)


def published_speed_table(rows: pd.DataFrame, published: pd.DataFrame) -> Table | None:
    """Rows of the published devices beside the published figures; ``None`` if there are none.

    Parameters
    ----------
    rows
        As :func:`corematching.results.hardware.efficiency_rows` gives them.
    """
    body = []
    for row in (rows.loc[index] for index in rows.index):
        alike = (published["method"] == row["method_name"]) & (published["device"].str.lower() == str(row["device"]).lower())
        for figure in published[alike].itertuples():
            what, own = QUANTITIES[str(figure.quantity)], row[figure.quantity]
            if pd.isna(own):
                continue  # one token is decoded by nobody
            entries = (
                *(word(row[name]) for name in ("model", "device")),
                word(row["output_tokens"]),
                word(budget(row["keep"])),
                word(what.title),
                number(own, 2),
                number(figure.value, 2),
                number(own / figure.value, 2),
                *(word(text) for text in (figure.certainty, figure.statement, figure.source)),
            )
            body.append((str(row["model"]), row["output_tokens"], Row(entries)))
    if not body:
        return None
    words = {"model": "Model", "device": "Device", "output": "Output tokens", "keep": "Keep", "quantity": "Quantity"}
    columns = (
        *(Column(key, heading, numeric=key in ("output", "keep")) for key, heading in words.items()),
        *(Column(key, key.capitalize()) for key in ("own", "published", "ratio")),
        Column("certainty", "Certainty", numeric=False),
        Column("statement", "As published", numeric=False),
        Column("source", "Source of the published number", numeric=False),
    )
    kind = "Predicted" if rows["predicted"].map(bool).all() else "Measured or predicted"
    caption = (
        f"{kind} here (own) beside published elsewhere: dense's figure over the method's. Stated: by the authors;"
        " secondary: a third party's notes, not the paper's own word. The published setting (prompt, answer length,"
        " budget) is not stated."
    )
    ordered = tuple(row for _, _, row in sorted(body, key=lambda one: one[:2]))
    title = "Beside published speed-ups"
    return mark(Table("published_speed", title, caption, columns, ordered, tuple(_explained(rows))))


def _explained(rows: pd.DataFrame) -> Iterator[str]:
    """What the predictions rest on where they differ between devices, from the rows themselves."""
    longest = rows[(rows["output_tokens"] == rows["output_tokens"].max()) & (rows["predicted"] == True)]  # noqa: E712
    for (model, device), own in longest.groupby(["model", "device"], sort=True):
        dense, ours = (own[own["method_name"] == name] for name in ("dense", "corematching"))
        if dense.empty or ours.empty:
            continue
        base, row = dense.iloc[-1], ours.iloc[-1]
        decode = f"decode {row['paired_decode_speedup']:.1f}x, end to end {row['paired_speedup']:.1f}x"
        streamed = base["streamed_bytes_per_token"]
        if streamed > 0:
            link = 1e-6 * streamed / base["decode_ms_per_token"]
            yield (
                f"{model}, {device}: {decode}. The weights do not fit: dense streams {streamed / 1e9:.2f} GB of FFNs per"
                f" token over the host link ({link:.1f} GB/s), a method that keeps its neurons on the device none. It"
                f" sets room aside for them, so that prefill streams more: {row['paired_prefill_speedup']:.2f}x"
                f"{_tokens_alone(own)}."
            )
        else:
            yield (
                f"{model}, {device}: {decode}. Everything is resident: decode gains what bytes read allow, and no link is"
                " saved."
            )
    if len(longest):
        texts = sorted({int(count) for count in longest["prompt_tokens"]})
        yield (
            f"Prompt of {' or '.join(map(str, texts))} tokens: text stays whatever the method drops, and decode costs"
            " everybody FLOPs, so ratios of FLOPs and KV are larger for shorter texts and answers (docs/efficiency.md)."
        )


def _tokens_alone(own: pd.DataFrame) -> str:
    """What prefill gains where only tokens are dropped and no room is set aside for neurons."""
    tokens = own[own["method_name"] == "core_tokens"]
    return f", {tokens.iloc[-1]['paired_prefill_speedup']:.2f}x without choosing neurons" if len(tokens) else ""
