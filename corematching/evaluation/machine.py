"""What this machine can run: decides the default model and data without importing torch."""

import ctypes
import os
import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

REAL_MODEL = "llava_1_5_7b"
REAL_REPOSITORY = "llava-hf/llava-1.5-7b-hf"


@cache
def gpu_count() -> int:
    """Number of NVIDIA GPUs that the driver reports (0 without a driver); takes milliseconds."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return 0
    try:
        driver = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint(0)
    if driver.nvmlInit_v2() != 0 or driver.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return 0
    return count.value


@cache
def gpu_name() -> str | None:
    """Name of the first visible NVIDIA GPU as its driver has it (torch says the same); None without one."""
    if gpu_count() == 0:
        return None
    driver = ctypes.CDLL("libnvidia-ml.so.1")
    first = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
    handle, text = ctypes.c_void_p(), ctypes.create_string_buffer(96)
    if driver.nvmlDeviceGetHandleByIndex_v2(int(first) if first.isdecimal() else 0, ctypes.byref(handle)) != 0:
        return None
    return text.value.decode() if driver.nvmlDeviceGetName(handle, text, len(text)) == 0 else None


def offline() -> bool:
    """Whether the user asked the Hugging Face libraries to stay offline."""
    return any(
        os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON")
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    )


@cache
def hub_reachable() -> bool:
    """Whether the Hugging Face Hub answers within a second."""
    if offline():
        return False
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        with socket.create_connection((address.hostname or "", port), timeout=1):
            return True
    except (OSError, ValueError):
        return False


def hub_cache() -> Path:
    """Folder in which the Hugging Face Hub client keeps what it downloaded."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def cached_revision(repository: str, revision: str = "main") -> str | None:
    """Commit of a cached Hub model at `revision` (a branch, tag or commit), or None when it is not cached."""
    folder = hub_cache() / f"models--{repository.replace('/', '--')}"
    reference = folder / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    return commit if (folder / "snapshots" / commit / "config.json").exists() else None


@cache
def why_small() -> str | None:
    """Why this machine cannot run the real checkpoint, in words; None when it can."""
    if gpu_count() == 0:
        return "no GPU found"
    if cached_revision(REAL_REPOSITORY) is None and not hub_reachable():
        return "no network and no cached weights"
    return None


def default(part: str) -> str:
    """The machine's choice for a configuration group (``model`` or ``data``); OmegaConf's resolver ``machine:``."""
    choices = {"model": (REAL_MODEL, "tiny"), "data": ("hub", "mini")}
    real, small = choices[part]
    return small if why_small() else real
