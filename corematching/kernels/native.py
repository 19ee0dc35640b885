"""CPU: the kernel of ``chosen_ffn.c``, compiled for the machine at its first use.

Torch has no operation that streams chosen rows in half precision, and on some processors its sparse operators read
float32 rows far below copy bandwidth. Where there is no C compiler, or torch brings no OpenMP of its own to share
threads with, nothing is compiled and callers take another way.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corematching import files

SOURCE = Path(__file__).with_name("chosen_ffn.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp")
LINE = 32
"""Widths are multiples of this: a cache line of the narrowest type."""
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
MOST_TOKENS = 8
"""Tokens computed with while a row is in the core's cache."""


def usable(weight: Tensor) -> bool:
    """Whether the kernel computes with weights like these on this machine."""
    return weight.device.type == "cpu" and weight.dtype in DTYPES and weight.shape[1] % LINE == 0 and bool(library())


@cache
def library() -> Any:
    """The compiled kernel; None where it cannot be had."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    openmp = _openmp()
    if compiler is None or openmp is None:
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler, openmp)))
    except (OSError, subprocess.SubprocessError):
        return None


def _openmp() -> str | None:
    """The OpenMP library that torch has loaded: with another one, its waiting threads would take the kernel's cores."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    paths = [line.split(maxsplit=5)[-1] for line in lines if "/" in line]
    return next((path for path in paths if Path(path).name.startswith(("libgomp", "libiomp5"))), None)


def _compiled(compiler: str, openmp: str) -> Path:
    """Path of the library for this source, compiler and processor; built if it is not there yet."""
    parts = (SOURCE.read_text(encoding="utf-8"), compiler, openmp, torch.__version__, " ".join(FLAGS), _processor())
    target = files.cache_home() / "kernels" / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made, linked = Path(folder, "made.o"), Path(folder, "made.so")
            run: Any = {"check": True, "capture_output": True, "timeout": 60}
            subprocess.run([compiler, *FLAGS, "-c", str(SOURCE), "-o", str(made)], **run)
            subprocess.run([compiler, "-shared", str(made), openmp, "-o", str(linked)], **run)
            os.replace(linked, target)
    return target


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def chosen_ffn(
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    index: Tensor,
    x: Tensor,
    activation: Callable[[Tensor], Tensor],
    chosen: Tensor | None = None,
) -> Tensor:
    """The gated FFN of a few tokens over chosen neurons, without copying rows.

    Parameters
    ----------
    gate, up, down
        [I, d], contiguous, float32 or bfloat16: one row per neuron in each.
    index
        Long [k].
    x
        [..., d]; up to :data:`MOST_TOKENS` tokens at a time share a row's way through the cache.
    activation
        The FFN's activation function.
    chosen
        Bool [tokens, k]: which of the neurons each token has; None: all.

    Returns
    -------
    Shape and dtype of ``x``; sums are kept in float32.
    """
    k, d, name, threads = len(index), gate.shape[1], DTYPES[gate.dtype], torch.get_num_threads()
    tokens = x.reshape(-1, d).float().contiguous()
    index = index.contiguous()
    pointer = ctypes.c_void_p
    long = ctypes.c_int64
    gated, raised = tokens.new_empty(len(tokens), k), tokens.new_empty(len(tokens), k)
    out = torch.empty_like(tokens)
    common = (pointer(index.data_ptr()), long(k), long(d))
    getattr(library(), f"dots_{name}")(
        *(pointer(one.data_ptr()) for one in (gate, up)),
        *common,
        pointer(tokens.data_ptr()),
        long(len(tokens)),
        *(pointer(one.data_ptr()) for one in (gated, raised)),
        ctypes.c_int(threads),
    )
    activations = (activation(gated) * raised).contiguous()
    if chosen is not None:
        activations = activations * chosen
    getattr(library(), f"add_up_{name}")(
        pointer(down.data_ptr()),
        *common,
        pointer(activations.data_ptr()),
        long(len(tokens)),
        pointer(out.data_ptr()),
        ctypes.c_int(threads),
    )
    return out.to(x.dtype).view(x.shape)
