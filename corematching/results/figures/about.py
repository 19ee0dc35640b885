"""What a figure must carry: model, data, n and versions, and whether it shows the bundled model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import pandas as pd

from corematching.results.tables import MINI_BANNER

#: Packages whose versions stand under a figure; its metadata names all that the cells know.
NAMED = ("corematching-bench", "torch", "transformers")


@dataclass(frozen=True)
class About:
    """Where a figure's numbers come from.

    Attributes
    ----------
    caption
        Model, data, n and the main versions, for the line under the figure.
    details
        The same with every version, the commits and the hardware, for the file's metadata.
    banner
        A line that must stand out, or nothing.
    """

    caption: str
    details: str
    banner: str = ""

    def adding(self, *remarks: str) -> About:
        """The same with remarks at the caption's end."""
        return replace(self, caption=" · ".join([self.caption, *filter(None, remarks)]))


def about_cells(cells: pd.DataFrame) -> About:
    """What the figures of accuracy cells carry."""
    done = cells[cells["status"] == "done"]
    facts = [
        *_models(cells),
        "data " + _listed(cells["data"]),
        f"n = {_range(done['n'])} questions per benchmark",
        *(f"prompt {prompt}" for prompt in _unique(cells["prompt"])),
    ]
    versions = _unique(f"{row.benchmark} {row.version}" for row in cells.itertuples() if row.version)
    return _about(facts, cells, MINI_BANNER if (cells["data"] == "mini").any() else "", versions)


def about_efficiency(rows: pd.DataFrame) -> About:
    """What the figures of efficiency rows carry; the settings stand over the panels."""
    repeats = f"n = {_range(rows['repeats'])} repeats" if rows["repeats"].notna().any() else "predicted, not measured"
    facts = [*_models(rows), "forced output lengths", repeats]
    return _about(facts, rows, MINI_BANNER if rows["model_config"].map(is_bundled).any() else "")


def about_versions(facts: Iterable[str], versions: Mapping[str, str], banner: str = "") -> About:
    """What a figure carries that was not drawn from a store."""
    facts = list(facts)
    named = [f"{name} {versions[name]}" for name in NAMED if name in versions]
    every = [f"{name} {version}" for name, version in sorted(versions.items())]
    return About(" · ".join([*facts, *named]), "; ".join([*facts, *every]), banner)


def is_bundled(model: Mapping[str, object]) -> bool:
    """Whether a cell's model config names weights inside this package."""
    return str(model.get("path")).startswith("packaged:") and model.get("weights") == "pretrained"


def packages(cells: pd.DataFrame) -> list[str]:
    """Every package and version that the cells were made with, by name."""
    return sorted({f"{name} {version}" for versions in cells["versions"] for name, version in versions.items()})


def _about(facts: list[str], cells: pd.DataFrame, banner: str, versions: Iterable[str] = ()) -> About:
    found = packages(cells)
    named = [one for name in NAMED for one in found if one.split(" ")[0] == name]
    commits = _unique(f"commit {commit}" for commit in cells["git_commit"] if commit)
    caption = " · ".join([*facts, *named])
    details = [*facts, *found, *commits, *versions, *_unique(cells["hardware"])]
    return About(caption, "; ".join(details), banner)


def _models(cells: pd.DataFrame) -> list[str]:
    return _unique(f"{row.model} ({row.dtype})" if row.dtype else row.model for row in cells.itertuples())


def _unique(texts: Iterable[str]) -> list[str]:
    return [text for text in sorted(set(texts)) if text]


def _listed(texts: Iterable[str], most: int = 3) -> str:
    found = _unique(texts)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def _range(numbers: pd.Series) -> str:
    known = sorted({int(number) for number in numbers.dropna()})
    return "?" if not known else f"{known[0]}" if len(known) == 1 else f"{known[0]} to {known[-1]}"
