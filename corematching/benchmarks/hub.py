"""Fetch datasets and models from the Hugging Face Hub into its own cache, so that later runs need no network.

The Hub's client starts a file again from nothing when a process was killed in the middle of it. Files here are often
several gigabytes, so `fetch` downloads them itself: a partial file stays beside its final place, the next attempt asks
the server for the rest, and the checksum is compared before the file counts. The client then finds the files in its
cache and does the book-keeping.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import http.client
import re
import shutil
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as ProgressBars
from tqdm.auto import tqdm

from corematching.benchmarks.spec import CONF_DIR, Benchmark
from corematching.errors import UserError

_CHUNK = 1 << 20
_ATTEMPTS = 5
_TIMEOUT = 30.0  # seconds without a byte
_HUB_ID = r"[\w.-]+/[\w.-]+"
_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")

#: Called with the number of bytes that just arrived (negative when a damaged file is thrown away).
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Repo:
    """What to fetch: files of one repository. `kind` is ``"dataset"`` or ``"model"``."""

    kind: str
    id: str
    patterns: tuple[str, ...]
    revision: str | None = None


@dataclass(frozen=True)
class File:
    """One file on the Hub: `digest` is its SHA-256 if it is stored in LFS, else its git blob id."""

    path: str
    size: int
    digest: str
    lfs: bool


@dataclass(frozen=True)
class Plan:
    """A repository at a commit, with the files wanted and those not yet in the cache."""

    repo: Repo
    commit: str
    files: tuple[File, ...]
    missing: tuple[File, ...]

    @property
    def bytes_missing(self) -> int:
        """Bytes still to come, partial files counted as what they lack."""
        return sum(file.size - _size(_partial(self.repo, file)) for file in self.missing)


def dataset_repo(benchmark: Benchmark, revision: str | None = None) -> Repo:
    """The dataset files that a benchmark reads.

    Raises
    ------
    UserError
        If the benchmark exists in the mini suite alone.
    """
    if benchmark.bundled:
        raise UserError(f"benchmark {benchmark.name} is part of the mini suite alone: run it with data=mini")
    patterns = [part.files for part in benchmark.parts]
    if benchmark.images is not None:
        patterns.append(benchmark.images.files)
    return Repo("dataset", benchmark.repo, tuple(patterns), revision)


def model_names() -> list[str]:
    """Names in ``conf/model`` whose weights come from the Hub."""
    return [path.stem for path in sorted((CONF_DIR / "model").glob("*.yaml")) if _hub_id(_read(path))]


def model_repo(name: str) -> Repo:
    """The repository of ``conf/model/<name>.yaml``, or of a Hub id (owner/name) itself.

    Raises
    ------
    UserError
        For anything else; names the valid names.
    """
    if re.fullmatch(_HUB_ID, name):
        return Repo("model", name, _MODEL_FILES)
    if name not in model_names():
        raise UserError(f"unknown model {name!r}; models on the Hub: {', '.join(model_names())}, or an id owner/name")
    settings = _read(CONF_DIR / "model" / f"{name}.yaml")
    return Repo("model", _hub_id(settings), _MODEL_FILES, settings.get("revision"))


def _read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _hub_id(settings: dict[str, Any]) -> str:
    path = str(settings.get("path", ""))
    return path if re.fullmatch(_HUB_ID, path) else ""


def dataset_folder(benchmark: Benchmark, revision: str | None = None) -> Path:
    """Folder of the dataset's snapshot in the Hub's cache, fetched if it is not complete there.

    Raises
    ------
    UserError
        If files are missing and cannot be fetched; the message says what to run.
    """
    repo = dataset_repo(benchmark, revision)
    if (folder := cached(repo)) is not None:
        return folder
    remedy = f"run: python scripts/download.py --benchmarks {benchmark.name}"
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise UserError(
            f"dataset {repo.id} is not in the cache and HF_HUB_OFFLINE is set; on a connected machine {remedy}"
        )
    try:
        missing = plan(repo)
        print(f"fetching {repo.id}: {gigabytes(missing.bytes_missing)}, once", file=sys.stderr)
        return fetch_with_bars([missing], Console(stderr=True))[0]
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from error


def cached(repo: Repo) -> Path | None:
    """Snapshot folder if all wanted files are in the cache, else None. Never touches the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(
            repo.id,
            repo_type=repo.kind,
            revision=repo.revision,
            allow_patterns=list(repo.patterns),
            local_files_only=True,
        )
    except LocalEntryNotFoundError:
        return None
    folder = Path(found)
    return folder if all(_complete(folder, pattern) for pattern in repo.patterns if "-*" in pattern) else None


def _complete(folder: Path, pattern: str) -> bool:
    """Whether the files of a sharded pattern are all there: shards are named ``-00001-of-00004``."""
    names = [path.name for path in folder.glob(pattern)]
    counts = {int(match[1]) for name in names if (match := re.search(r"-of-(\d+)", name))}
    return bool(names) and all(len(names) >= count for count in counts)


def plan(repo: Repo) -> Plan:
    """Ask the Hub which files the repository has and compare with the cache.

    Raises
    ------
    UserError
        If the Hub cannot be reached, does not know the repository or revision, or has no matching file.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    what = f"{repo.kind} {repo.id}"
    try:
        info: Any = HfApi().repo_info(repo.id, repo_type=repo.kind, revision=repo.revision, files_metadata=True)
    except GatedRepoError as error:
        raise UserError(f"{what} is gated: accept its terms on the Hub and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{what} has no revision {repo.revision!r}") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{what} does not exist on the Hub, or needs HF_TOKEN to be set") from error
    except Exception as error:  # the client raises whatever its HTTP library does
        raise UserError(f"{what} cannot be fetched: the Hub cannot be reached ({type(error).__name__})") from error
    files = tuple(
        File(entry.rfilename, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id, entry.lfs is not None)
        for entry in info.siblings
        if any(fnmatch.fnmatch(entry.rfilename, pattern) for pattern in repo.patterns)
    )
    if not files:
        raise UserError(f"{what} has no file that matches {', '.join(repo.patterns)}")
    missing = tuple(file for file in files if _size(_blob(repo, file)) != file.size)
    return Plan(repo, info.sha, files, missing)


def fetch(plan: Plan, progress: Progress | None = None) -> Path:
    """Download what is missing and return the snapshot folder.

    Raises
    ------
    UserError
        If a file cannot be fetched after several attempts or its checksum is wrong. What has arrived is kept.
    """
    from huggingface_hub import snapshot_download

    free = shutil.disk_usage(_existing(_blobs(plan.repo))).free
    if plan.bytes_missing > free:
        raise UserError(f"{plan.repo.id} needs {gigabytes(plan.bytes_missing)}, but only {gigabytes(free)} are free")
    for file in plan.missing:
        _fetch_file(plan, file, progress or (lambda count: None))
    return Path(
        snapshot_download(
            plan.repo.id,
            repo_type=plan.repo.kind,
            revision=plan.repo.revision,
            allow_patterns=list(plan.repo.patterns),
            tqdm_class=_NoBar,
        )
    )


class _NoBar(tqdm):
    """The client's own bar: by its turn all bytes are here, and what is left takes no time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


def fetch_with_bars(plans: Sequence[Plan], console: Console) -> list[Path]:
    """`fetch` several plans, with a progress bar for each; returns their snapshot folders."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    folders = []
    with ProgressBars(*columns, TimeRemainingColumn(), console=console) as bars:
        for plan in plans:
            bar = bars.add_task(plan.repo.id, total=plan.bytes_missing)
            folders.append(fetch(plan, functools.partial(bars.advance, bar)))
    return folders


def verify(plan: Plan) -> list[str]:
    """Check the sums of all cached files; damaged ones are removed. Returns their paths."""
    damaged = []
    for file in plan.files:
        blob = _blob(plan.repo, file)
        if blob.exists() and _digest(blob, file) != file.digest:
            blob.unlink()
            damaged.append(file.path)
    return damaged


def gigabytes(count: int) -> str:
    """A number of bytes for people, in GB of 10^9 bytes (or MB below one)."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _blobs(repo: Repo) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"{repo.kind}s--{repo.id.replace('/', '--')}" / "blobs"


def _blob(repo: Repo, file: File) -> Path:
    return _blobs(repo) / file.digest


def _partial(repo: Repo, file: File) -> Path:
    return _blobs(repo) / f"{file.digest}.part"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _digest(path: Path, file: File) -> str:
    sums = hashlib.sha256() if file.lfs else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            sums.update(chunk)
    return sums.hexdigest()


def _fetch_file(plan: Plan, file: File, progress: Progress) -> None:
    partial = _partial(plan.repo, file)
    partial.parent.mkdir(parents=True, exist_ok=True)
    problem = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(min(8.0, 0.25 * 2**attempt))
        try:
            if _size(partial) < file.size or not partial.exists():
                _receive(plan, file, partial, progress)
        except (OSError, http.client.HTTPException) as error:
            problem = f"the transfer broke ({error})"
            continue
        if _size(partial) < file.size:
            problem = "the transfer broke"
        elif _digest(partial, file) != file.digest:
            progress(-_size(partial))
            partial.unlink()
            problem = "its checksum is wrong"
        else:
            partial.replace(_blob(plan.repo, file))
            return
    raise UserError(f"{plan.repo.id}: {file.path} could not be fetched: {problem}; run the same command again to go on")


def _receive(plan: Plan, file: File, partial: Path, progress: Progress) -> None:
    """Append what the partial file lacks."""
    from huggingface_hub import get_token, hf_hub_url

    url = hf_hub_url(plan.repo.id, file.path, repo_type=plan.repo.kind, revision=plan.commit)
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
    if token := get_token():
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # must not follow to the storage host
    start = _size(partial)
    if start:
        request.add_header("Range", f"bytes={start}-")
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as reply:
        resumed = reply.status == 206
        if start and not resumed:
            progress(-start)
        with partial.open("ab" if resumed else "wb") as out:
            while chunk := reply.read(_CHUNK):
                out.write(chunk)
                progress(len(chunk))


def plans(repos: Sequence[Repo]) -> list[Plan]:
    """Plan several repositories; wishes for the same repository and revision are joined."""
    joined: dict[tuple[str, str, str | None], tuple[str, ...]] = {}
    for repo in repos:
        key = (repo.kind, repo.id, repo.revision)
        joined[key] = tuple(dict.fromkeys((*joined.get(key, ()), *repo.patterns)))
    return [plan(Repo(kind, name, patterns, revision)) for (kind, name, revision), patterns in joined.items()]
