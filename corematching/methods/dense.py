"""The dense baseline."""

from __future__ import annotations

from dataclasses import dataclass

from corematching.methods.base import Geometry, Method, Stage


@dataclass(frozen=True)
class Dense(Method):
    """Nothing is dropped: the stock model, run through the engine so that traces and timings compare."""

    def stages(self, geometry: Geometry) -> list[Stage]:
        return []
