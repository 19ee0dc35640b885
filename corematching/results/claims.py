"""Claims: which process computes which cell, also between hosts whose shared disk has no file locks.

A claim is a lease: a file ``<cell id>.<generation>.lease`` that says which process on which host holds it, and that its
holder touches every :data:`BEAT` seconds. It ends when its holder releases it, and is taken over

- at once if its holder was a process of this host that is gone,
- else when it was watched for :data:`EXPIRY` seconds without being touched.

Whoever takes over creates the next generation. The file system lets exactly one process create a file of a given name
(on NFS, too), so that of any number that try, one wins; nothing depends on ``flock``.

Clocks are never compared: a watcher counts seconds on its own monotonic clock and only looks whether the file's time
*changed*, so that hosts may be hours apart. What must hold is that a touch is visible elsewhere within `EXPIRY` (NFS
caches attributes for up to 60 seconds by default; leases are opened to be read, which asks the server).

A process that stood still for longer (suspended, swapped out) loses its claim without knowing. Then two processes
compute one cell, and both publish it whole; see `corematching.results.store`.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from corematching.errors import UserError

BEAT = 10.0
"""Seconds between two touches of a lease."""
EXPIRY = 90.0
"""Seconds after which a lease that nobody touched is free for all."""
_SUFFIX = ".lease"


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes
    ----------
    host
        See `this_host`.
    pid
        Process on that host.
    started
        When that process began, in the kernel's ticks: a later process may get the same number.
    """

    host: str
    pid: int
    started: int | None = None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host.split()[0]}"

    @property
    def gone(self) -> bool:
        """Whether this was a process of this host, and is no more."""
        return self.host == this_host() and not _runs(self.pid, self.started)


def this_host() -> str:
    """The machine's name, its boot and its process namespace: where process numbers mean the same."""
    parts = [os.uname().nodename or "unnamed"]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return " ".join(parts)


class Claims:
    """The leases in one folder, as one process sees them.

    Parameters
    ----------
    folder
        Where the leases lie; must exist when a claim is made.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._seen: dict[str, tuple[tuple, float]] = {}
        self._held: set[Path] = set()
        self._lock = threading.Lock()
        self._beating = False
        self._never = threading.Event()

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Try to hold `name` for as long as the block lasts; yields whether that worked.

        Raises
        ------
        UserError
            If the lease cannot be written.
        """
        try:
            lease = self._acquire(name)
        except OSError as error:
            raise UserError(
                f"cannot reserve a cell in '{self.folder}' ({error.strerror or error}); finished cells are safe, "
                "run the same command again to resume"
            ) from error
        if lease is None:
            yield False
            return
        try:
            yield True
        finally:
            with self._lock:
                self._held.discard(lease)
            with suppress(OSError):
                lease.unlink()

    def holder(self, name: str) -> Holder | None:
        """Who holds `name`, as far as can be read; None where nobody does."""
        leases = self._leases(name)
        return _read(leases[max(leases)])[1] if leases else None

    def _acquire(self, name: str) -> Path | None:
        """The lease on `name`, now ours, or None when another process holds it."""
        leases = self._leases(name)
        newest = max(leases, default=0)
        if leases and self._alive(leases[newest]):
            return None
        own = self.folder / f"{name}.{newest + 1}{_SUFFIX}"
        try:
            descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return None
        try:
            with suppress(OSError):  # on a full disk, the lease holds without saying for whom
                os.write(descriptor, json.dumps(asdict(_this_process())).encode())
        finally:
            os.close(descriptor)
        # A folder's listing may be old or torn; after our own change to it, it is not.
        if max(self._leases(name), default=0) > newest + 1:
            own.unlink(missing_ok=True)
            return None
        for old in leases.values():
            with suppress(OSError):
                old.unlink()
        self._keep(own)
        return own

    def _leases(self, name: str) -> dict[int, Path]:
        """Paths of the leases on `name` by generation; the highest one counts."""
        found = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                cell, _, generation = entry.name.removesuffix(_SUFFIX).rpartition(".")
                if cell == name and entry.name.endswith(_SUFFIX) and generation.isdecimal():
                    found[int(generation)] = Path(entry.path)
        return found

    def _alive(self, lease: Path) -> bool:
        """Whether the holder of a lease has to be reckoned with."""
        try:
            mark, holder = _read(lease)
        except FileNotFoundError:
            return True  # released just now: whoever comes next may have it
        if holder is not None and holder.gone:
            return False
        seen, since = self._seen.get(lease.name, (None, 0.0))
        if mark != seen:
            self._seen[lease.name] = mark, time.monotonic()
            return True
        return time.monotonic() - since < EXPIRY

    def _keep(self, lease: Path) -> None:
        """See to it that the lease is touched until it is released."""
        with self._lock:
            self._held.add(lease)
            if not self._beating:
                self._beating = True
                threading.Thread(target=self._beat, name="claims", daemon=True).start()

    def _beat(self) -> None:
        while True:
            self._never.wait(BEAT)
            with self._lock:
                if not self._held:
                    self._beating = False
                    return
                held = list(self._held)
            for lease in held:
                with suppress(OSError):  # gone: another host has taken over
                    os.utime(lease)


def _read(lease: Path) -> tuple[tuple, Holder | None]:
    """What changes when a lease is touched, and who holds it (None if it does not say)."""
    with lease.open("rb") as file:
        content, status = file.read(4096), os.fstat(file.fileno())
    mark = (status.st_ino, status.st_mtime_ns, content)
    try:
        said = json.loads(content)
        return mark, Holder(str(said["host"]), int(said["pid"]), said["started"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return mark, None


def _this_process() -> Holder:
    with suppress(OSError, ValueError, IndexError):
        return Holder(this_host(), os.getpid(), _state(os.getpid())[1])
    return Holder(this_host(), os.getpid())


def _runs(pid: int, started: int | None) -> bool:
    """Whether the process that had this number is still there, and not only waiting to be reaped."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return True  # /proc is another namespace's: its numbers are not ours
        state, began = _state(pid)
    except (OSError, ValueError, IndexError):
        return True
    return state not in "ZX" and started in (None, began)


def _state(pid: int) -> tuple[str, int]:
    """State letter and start of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[19])
