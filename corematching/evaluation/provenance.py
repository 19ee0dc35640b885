"""Where a number comes from: versions, commit, hardware, and the identity of model weights."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from corematching.errors import UserError
from corematching.evaluation import machine
from corematching.files import cpu_name
from corematching.registry import FILE_PARAMETERS, file_of

_PACKAGES = ("corematching-bench", "torch", "transformers", "lmms-eval", "datasets", "numpy", "pandas")
_PACKAGED = "packaged:"  # as in corematching.models.loading, which needs torch
_WHOLE_FILE = 256 * 2**20  # hash files up to this size completely; above, their size and first megabyte


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def git_commit() -> str | None:
    """Commit of this source tree, with ``+dirty`` if tracked files differ; None outside a git checkout."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        dirty = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".", "../conf")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+dirty" if dirty else "")


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=20
    ).stdout.strip()


@cache
def hardware() -> dict[str, Any]:
    """CPU model, usable cores, GPU name (None without one)."""
    return {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "gpu": machine.gpu_name()}


def folder_digest(folder: Path) -> str:
    """First 16 hex digits of a SHA-256 over a model folder's configuration, tokenizer and weights.

    Raises
    ------
    UserError
        If the folder holds no model.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".jinja", ".model"))
    if not (folder / "config.json").is_file():
        raise UserError(f"'{folder}' is not a model folder: it has no config.json")
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read() if size <= _WHOLE_FILE else file.read(2**20))
    return digest.hexdigest()[:16]


def method_files(method: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the files that a method's parameters name, by parameter; of one composed with it as ``with.NAME``.

    A path that leads nowhere has none: the method says what is wrong with it.
    """
    second = method.get("with")
    found = {f"with.{name}": digest for name, digest in method_files(second).items()} if second else {}
    for name in FILE_PARAMETERS:
        value = method.get(name)
        if isinstance(value, str) and file_of(value).is_file():
            found[name] = hashlib.sha256(file_of(value).read_bytes()).hexdigest()[:16]
    return found


def model_revision(model: Mapping[str, Any]) -> str:
    """What identifies the weights of a model configuration: a digest for local ones, a commit for the Hub's.

    Random weights of a configured architecture are identified by that architecture.

    Raises
    ------
    UserError
        If the path is neither a model folder nor a Hub model that is cached or reachable.
    """
    path = str(model["path"])
    if model["weights"] == "random" and model.get("architecture"):
        text = json.dumps(model["architecture"], sort_keys=True)
        return "random-" + hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = packaged_path(path) or Path(path).expanduser()
    if folder.is_dir():
        return folder_digest(folder)
    if path.startswith(("/", ".", "~")) or path.count("/") != 1 or packaged_path(path):
        raise UserError(
            f"no model at '{path}': give a folder with config.json, or a Hub id such as {machine.REAL_REPOSITORY}"
        )
    return _hub_commit(path, model["revision"] or "main")


def at_hand(model: Mapping[str, Any]) -> bool:
    """Whether a model can be identified without the Hub."""
    path = str(model["path"])
    drawn = model["weights"] == "random" and model.get("architecture")
    local = Path(path).expanduser().is_dir() or path.startswith(("/", ".", "~")) or path.count("/") != 1
    return bool(drawn) or local or machine.cached_revision(path, model["revision"] or "main") is not None


def packaged_path(path: str) -> Path | None:
    """Folder behind a path inside the installed package (``packaged:NAME``), None for any other path."""
    if not path.startswith(_PACKAGED):
        return None
    return Path(__file__).parents[1] / "models" / path.removeprefix(_PACKAGED)


def _hub_commit(repository: str, revision: str) -> str:
    commit = machine.cached_revision(repository, revision)
    if commit:
        return commit
    if not machine.hub_reachable():
        raise UserError(
            f"model '{repository}' is not cached and the Hub cannot be reached: run `python scripts/download.py "
            f"--models {repository}` on a machine with network, or use model=tiny"
        )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(HfApi().model_info(repository, revision=revision, timeout=10).sha)
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the Hub does not give model '{repository}' at revision '{revision}': {reason}") from error
