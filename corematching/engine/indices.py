"""Sets of indices of many samples, held small: a bit per possible index instead of eight bytes per chosen one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class PackedIndices(Sequence):
    """Reads like a list of index sets, long and ascending, or None; each is unpacked when it is asked for.

    A trace of LLaVA-1.5-7B with two neurons in five chosen takes 44 KB, not the 1.1 MB of its indices: an accuracy run
    holds one for every question of every cell that it answers.

    Parameters
    ----------
    sets
        Integers in any order and number of times; None stays None.
    """

    def __init__(self, sets: Sequence[Tensor | None]) -> None:
        self._bits = [None if indices is None else _packed(indices) for indices in sets]

    def __len__(self) -> int:
        return len(self._bits)

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(len(self))[place]]
        bits = self._bits[place]
        return (
            None
            if bits is None
            else torch.from_numpy(np.flatnonzero(np.unpackbits(np.frombuffer(bits, dtype=np.uint8))))
        )

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PackedIndices):
            return self._bits == other._bits
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return repr(list(self))


def _packed(indices: Tensor) -> bytes:
    marks = np.zeros(int(indices.max()) + 1 if indices.numel() else 0, dtype=bool)
    marks[indices.cpu().numpy()] = True
    return np.packbits(marks).tobytes()
