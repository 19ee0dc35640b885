"""Which accuracy cells stand in a table, and which of them make one row."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

#: Cells that may stand in one table. ``limits`` is empty unless a benchmark was run on several numbers of questions.
CONTEXT = ["model", "data", "prompt", "limits"]
#: Cells that answered the same questions.
QUESTIONS = ["model", "data", "prompt", "benchmark", "version", "limit"]


def select(cells: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Choose the accuracy cells that tables show.

    A benchmark run on several numbers of questions gets a table for each (column ``limits``). Of several data versions
    the one with most questions is taken. Cells that differ only in what a table does not show (revision, generation
    settings) are reduced to the one finished last; a finished cell wins over a failed one. Cells whose methods differ
    only in their ``seed`` share a row. Two sets of parameters under one label get the parameters that differ added to
    the label.

    Returns
    -------
    cells : pandas.DataFrame
        One row per method, parameters and seed in each context, with ``row``, the key of those but for the seed.
    notes : list of str
        What was left aside, in words.
    """
    chosen = _by_limit(cells[cells["kind"] == "accuracy"].copy())
    chosen = _rows(chosen)
    chosen, notes = _one_version(chosen)
    key = [*CONTEXT, "benchmark", "row", "method_seed"]
    # Failed cells first, then by the time they finished: the last of each row is the one to show.
    chosen = chosen.assign(done=chosen["status"] == "done").sort_values(["done", "finished", "id"], kind="stable")
    repeated = chosen[chosen.duplicated(key, keep=False)]
    left_out = int(chosen.duplicated(key, keep="last").sum())
    if left_out:
        groups = repeated["settings"].groupby([repeated[name] for name in key], sort=False)
        differ = differences(groups) or "what the cells do not record"
        noun = "1 cell repeats another" if left_out == 1 else f"{left_out} cells repeat others"
        notes.append(f"{noun} but for {differ}; of each, the one finished last is shown.")
    chosen = chosen.drop_duplicates(key, keep="last").sort_index().drop(columns="done")
    return _distinct_labels(chosen.reset_index(drop=True)), notes


def _by_limit(cells: pd.DataFrame) -> pd.DataFrame:
    """Add ``limits``: how many questions were asked for, where that differs within a benchmark."""
    place = ["model", "data", "prompt"]
    asked = cells["limit"].map(lambda limit: "all" if limit != limit else f"n{limit:g}")
    several = asked.groupby([cells[name] for name in (*place, "benchmark")]).transform("nunique") > 1
    split = several.groupby([cells[name] for name in place]).transform("any").astype(bool)
    return cells.assign(limits=asked.where(split, ""))


def _rows(cells: pd.DataFrame) -> pd.DataFrame:
    """Add ``row`` and ``method_seed``; seeds under labels of their own get one label in common."""
    bare = [_without_seed(parameters) for parameters in cells["parameters"]]
    base = [_key([name, own]) for name, own in zip(cells["method_name"], bare, strict=True)]
    seeds = [
        "" if parameters == own else _key(parameters) for parameters, own in zip(cells["parameters"], bare, strict=True)
    ]
    cells = cells.assign(row=base, method_seed=seeds)
    labels = cells["method"].copy()
    for _, group in cells.groupby("row", sort=False):
        names = group["method"].unique()
        if len(names) > 1 and not group[["method_seed", "method"]].drop_duplicates().duplicated("method_seed").any():
            labels[group.index] = _common_label(names, group["method_name"].iloc[0])
    rows = [_key([label, row]) for label, row in zip(labels, cells["row"], strict=True)]
    return cells.assign(method=labels, row=rows)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _without_seed(value: Any) -> Any:
    """Parameters without any ``seed``, also in composed methods."""
    if isinstance(value, dict):
        return {name: _without_seed(held) for name, held in value.items() if name != "seed"}
    return [_without_seed(held) for held in value] if isinstance(value, list) else value


def _common_label(labels: Sequence[str], method: str) -> str:
    """What labels such as "random (seed 0)" and "random (seed 1)" share; the method's name if they share nothing."""
    ends = min(labels), max(labels)
    shared = "".join(one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False)))
    return re.sub(r"[\s(,;:=#_-]*(seeds?)?[\s(,;:=#_-]*$", "", shared, flags=re.IGNORECASE) or method


def _one_version(cells: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Of each benchmark's data versions the one with most questions; ties go to the one finished last."""
    notes: list[str] = []
    kept = []
    for (model, *_, benchmark), group in cells.groupby([*CONTEXT, "benchmark"], sort=False):
        if len(group["version"].unique()) > 1:
            sizes = group.groupby("version", sort=False)["n"].transform("max").fillna(0)
            best = group.assign(size=sizes).sort_values(["size", "finished", "id"], kind="stable").iloc[-1]
            same = group["version"] == best["version"]
            notes.append(
                f"{benchmark} ({model}): {int((~same).sum())} cells on another version of its data are not shown; "
                f"the table is of version {best['version'] or 'unknown'}, n = {best['n']:g}."
            )
            group = group[same]
        kept.append(group)
    return (pd.concat(kept).sort_index() if kept else cells), notes


def differences(groups: Iterable[tuple[Any, Iterable[dict[str, Any]]]]) -> str:
    """In words: which settings differ within (key, settings) groups, and between which values; empty if none do."""
    found: dict[str, set[str]] = {}
    for _, group in groups:
        settings = list(group)
        for name in dict.fromkeys(name for one in settings for name in one):
            values = {_key(one.get(name)) for one in settings}
            if len(values) > 1:
                found.setdefault(name, set()).update(values)
    listed = [f"{name} ({', '.join(sorted(values)[:4])})".replace('"', "") for name, values in sorted(found.items())]
    return " and ".join(listed)


def _distinct_labels(cells: pd.DataFrame) -> pd.DataFrame:
    labels = cells["method"].copy()
    names = cells["method"] + "\x00" + cells["keep"].map(str)
    for _, group in cells.groupby(names, sort=False):
        variants = dict(zip(group["row"], group["parameters"], strict=True))
        if len(variants) == 1:
            continue
        varied = varied_parameters(list(variants.values()))
        for index, parameters in group["parameters"].items():
            labels[index] = (
                f"{group['method'].iloc[0]} ({', '.join(f'{name}={parameters.get(name)}' for name in varied)})"
            )
    return cells.assign(method=labels)


def varied_parameters(variants: list[dict]) -> list[str]:
    """Names of the parameters (``keep`` and ``seed`` apart) that differ between ``variants``, as they appear."""
    names = list(dict.fromkeys(name for variant in variants for name in variant if name not in ("keep", "seed")))
    return [name for name in names if len({_key(variant.get(name)) for variant in variants}) > 1]
