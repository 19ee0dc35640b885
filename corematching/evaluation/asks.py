"""What a command asks for, and which folder its results get.

An experiment's file names its folder. A command that names methods, budgets or benchmarks of its own (``method=fastv
keep=[64,32] benchmark=pope``) is no experiment: its folder is named from its words, or by ``name=``. An experiment with
other settings (``limit=5``) shows another table; it may use the experiment's folder if nothing else stands there, and
gets one beside it otherwise. The same ask always finds the same folder, so that it resumes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from corematching import groups
from corematching.errors import UserError
from corematching.evaluation import machine
from corematching.results import remote
from corematching.results.manifest import read_manifest

#: Settings that say how or where a table is made, not what it shows.
_OPERATIONAL = (
    *(
        "results_dir",
        "report",
        "debug",
        "tracking",
        "executor",
        "batch_size",
        "together",
        "features",
        "force",
        "dry_run",
        "name",
        "shard",
        "shards",
    ),
    *("experiment", "runner", "hydra", "judge", "hardware"),  # the last two add to a table what was a hole
)
_AD_HOC = ("method", "methods", "keep", "benchmarks", "match")
_LONGEST = 60


def key_of(word: str) -> str:
    """The part or setting that a word of the command line changes: ``method`` for ``+method.layer=3``."""
    return word.split("=", 1)[0].lstrip("+~").split(".")[0].split("@")[0]


def table_words(words: Iterable[str]) -> list[str]:
    """The words that decide what the table shows, sorted, the last of repeated ones.

    A model or data set that would have been chosen anyway is no other ask.
    """
    given = {word.split("=", 1)[0].lstrip("+~"): word.lstrip("+") for word in words}
    experiment = given.get("experiment", "experiment=quickstart").split("=", 1)[1]
    return sorted(
        word
        for name, word in given.items()
        if key_of(name) not in _OPERATIONAL
        and word not in {f"{part}={_default(experiment, part)}" for part in ("model", "data")}
    )


def ad_hoc(words: Iterable[str]) -> bool:
    """Whether a command asks for something that no experiment's file says."""
    keys = {key_of(word) for word in words}
    return "experiment" not in keys and bool(keys & set(_AD_HOC))


def named_from(words: Sequence[str]) -> str:
    """A folder's name from the words of an ask: ``fastv-keep-64-32-pope``."""
    first = ("method", "methods", "keep", "benchmarks")
    ordered = sorted(table_words(words), key=lambda word: first.index(key) if (key := key_of(word)) in first else 9)
    shown = [
        word.partition("=")[2] if word.startswith(("method=", "methods=", "benchmarks=")) else word for word in ordered
    ]
    name = re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(shown)).strip("-.") or "full"
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST].rstrip('-.')}-{_digest(words)}"


def ask_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `corematching.results.manifest.Manifest` keeps of a command."""
    return {
        "words": table_words(settings["command"]),
        "model": settings["model"]["name"],
        "data": settings["data"]["name"],
    }


def folder_of(settings: Mapping[str, Any]) -> Path:
    """The folder of a composed configuration's results; of a remote one its mirror, see `corematching.results.remote`.

    Raises
    ------
    UserError
        If ``name=`` was given and stands for something else already.
    """
    base, name, ask = settings["results_dir"].rstrip("/") or "/", settings["experiment"], ask_of(settings)
    words = settings["command"]
    candidates = [name, f"{name}-{named_from(words)}", f"{name}-{named_from(words)}-{_digest(words)}"]
    for candidate in candidates[:1] if settings.get("name") else candidates:
        folder = remote.local(f"{base}/{candidate}")
        if _free_for(folder, ask):
            return folder
    if settings.get("name"):
        raise UserError(
            f"name={name} stands for another command in '{base}/{name}'; choose another name or results_dir"
        )
    return folder


def _free_for(folder: Path, ask: Mapping[str, Any]) -> bool:
    """Whether a folder holds no cells, or those of this ask; cells of nobody in particular are the experiment's own."""
    used = [part for part in ("cells", "claims") if (folder / part).is_dir() and any((folder / part).iterdir())]
    if not used:
        return True
    manifest = read_manifest(folder)
    return not ask["words"] if manifest is None else dict(manifest.ask) == ask


def _default(experiment: str, part: str) -> str:
    """The choice for ``model`` or ``data`` where a command names none."""
    if experiment in groups.choices("experiment"):
        for entry in groups.load("experiment", experiment).get("defaults", []):
            if isinstance(entry, dict) and f"override /{part}" in entry:
                return str(entry[f"override /{part}"])
    return machine.default(part)


def _digest(words: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(table_words(words)).encode()).hexdigest()[:6]
