"""Files that appear whole or not at all, however the process or the disk ends."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from corematching.errors import UserError


def cache_home() -> Path:
    """Folder for what can be made again (data, kernels, measurements): ``$CM_CACHE``, or ``~/.cache/corematching``."""
    return Path(os.environ.get("CM_CACHE") or Path.home() / ".cache" / "corematching")


def cpu_name() -> str:
    """The processor's model name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file under a temporary name beside `path`; it takes `path`'s place, synced, when the block ends well.

    The temporary name has `path`'s suffix, so that writers that go by it find the right format. Missing folders are
    made.

    Raises
    ------
    UserError
        If the file system refuses (full, read-only, a folder in the way); what stood at `path` is then still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem[:100]}-{secrets.token_hex(6)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write '{path}' ({error.strerror or error}); free space or choose another folder, then try again"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write(path: str | Path, content: str | bytes) -> Path:
    """Write text (as UTF-8) or bytes to a file, whole or not at all; see `replacing`."""
    data = content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return Path(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there; what a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
