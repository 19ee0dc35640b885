"""Peak memory of a piece of work, on GPUs and CPUs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass
class Peak:
    """Bytes; filled in when the measured block ends."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the highest memory use inside the block: tensors allocated on a GPU, else the process's resident set."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
    else:
        _reset_resident_peak()
        yield peak
        peak.bytes = _noted("/proc/self/status", "VmHWM") or 0


def _reset_resident_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # then the peak is the process's so far, an upper bound


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated: on a GPU, else what the machine and this process's control group allow.

    None where nothing says.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    bounds = [_noted("/proc/meminfo", "MemAvailable"), _group_room()]
    return min((bound for bound in bounds if bound is not None), default=None)


def _noted(path: str, name: str) -> int | None:
    """Bytes that a file under /proc gives by a name, in kB there; None where nothing does."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _group_room(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What is left of a control group's limit (version 2); None without one. Cached files count as free."""
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        files = next(
            int(line.split()[1])
            for line in (folder / "memory.stat").read_text().splitlines()
            if line.startswith("file ")
        )
    except (OSError, ValueError, StopIteration):
        return None
    return max(0, limit - used + files)


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed blocks for reuse; returns whether it agreed.

    Large activations are otherwise mapped and unmapped for every layer, and the page faults cost a CPU up to half of
    its matrix product rate. Affects dense and pruned runs alike.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(_M_MMAP_THRESHOLD, 2**30)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, 2**30))
    except (OSError, AttributeError):
        return False
