"""A method whose decode steps are measured: how much of dense attention falls on the rows they read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from corematching.methods.base import Geometry, MeasureMass, Method, Stage


@dataclass(frozen=True)
class Measured(Method):
    """Another method, with :class:`MeasureMass` in every layer; answers are the same, steps take longer."""

    method: Method

    @property
    def acts_on(self) -> frozenset[str]:  # type: ignore[override]
        return self.method.acts_on

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.method.name

    @property
    def parameters(self) -> dict[str, Any]:
        return self.method.parameters

    def stages(self, geometry: Geometry) -> list[Stage]:
        return [*self.method.stages(geometry), *(MeasureMass(layer) for layer in range(geometry.depth))]
