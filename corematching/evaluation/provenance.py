"""Where a number comes from: versions, commit, hardware, and the identity of model weights."""

import hashlib
import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from corematching.errors import UserError
from corematching.evaluation import machine

_PACKAGES = ("corematching-bench", "torch", "transformers", "lmms-eval", "datasets", "numpy", "pandas")
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
    """CPU model, usable cores, GPU name (None without one); imports torch only where the driver reports a GPU."""
    gpu = None
    if machine.gpu_count():
        import torch

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0)), "gpu": gpu}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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


def model_revision(path: str, revision: str | None) -> str:
    """What identifies the weights behind `path`: a digest for a local folder, a commit for a Hub id.

    Raises
    ------
    UserError
        If `path` is neither a model folder nor a Hub model that is cached or reachable.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder_digest(folder)
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise UserError(f"no model at '{path}': give a folder with config.json, or a Hub id such as {machine.REAL_REPOSITORY}")
    commit = machine.cached_revision(path, revision or "main")
    if commit:
        return commit
    if not machine.hub_reachable():
        raise UserError(
            f"model '{path}' is not cached and the Hub cannot be reached: run `python scripts/download.py --models {path}` "
            "on a machine with network, or use model=tiny"
        )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(HfApi().model_info(path, revision=revision, timeout=10).sha)
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"the Hub does not give model '{path}' at revision '{revision}': {str(error).splitlines()[0]}") from error
