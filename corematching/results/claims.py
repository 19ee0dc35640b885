"""Claims: which process computes which cell, held by file locks that the kernel drops with their process."""

from __future__ import annotations

import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path

from corematching.errors import UserError


class Claim(Enum):
    """What an attempt to claim came to."""

    TAKEN = "another process holds it"
    HELD = "nobody else can hold it"
    UNLOCKED = "this file system has no locks: others may hold it, too"


@contextmanager
def claim(path: Path) -> Iterator[Claim]:
    """Try to lock `path` for this process, for as long as the block lasts.

    Raises
    ------
    UserError
        If the lock file cannot be made.
    """
    try:
        descriptor, how = _try_lock(path)
    except OSError as error:
        raise UserError(
            f"cannot reserve a cell in '{path.parent}' ({error.strerror or error}); finished cells are safe, "
            "run the same command again to resume"
        ) from error
    if descriptor is None:
        yield how
        return
    try:
        with suppress(OSError):  # who holds it is for people who look; a full disk stops the cell, not the claim
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.uname().nodename} {os.getpid()}\n".encode())
        yield how
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _try_lock(path: Path) -> tuple[int | None, Claim]:
    """An open descriptor that holds the lock on `path`, or None when another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None, Claim.TAKEN
        except OSError as error:
            warnings.warn(
                f"no file locks on {path.parent} ({error.strerror}): several processes may compute the same cell",
                stacklevel=4,
            )
            return descriptor, Claim.UNLOCKED
        # Whoever held the lock before may have removed the file between our open and our lock; then try the new one.
        try:
            same = os.path.samestat(os.stat(path), os.fstat(descriptor))
        except FileNotFoundError:
            same = False
        if same:
            return descriptor, Claim.HELD
        os.close(descriptor)
