"""Work on large stores is spread over the processor's cores; what comes out, and its order, is the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

LARGE = 20_000
"""Cells from which on further processes are worth the seconds that they take to start."""
_MOST = 8
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def spread(work: Callable[[_Item], _Result], items: Sequence[_Item], cells: int) -> Iterator[_Result]:
    """`work` on each item, in order; in several processes if the items are of at least `LARGE` cells."""
    cores = min(len(os.sched_getaffinity(0)), len(items), _MOST)
    if cells < LARGE or cores < 2:
        yield from map(work, items)
        return
    # Not forked: pandas and arrow have threads by now.
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, items)
