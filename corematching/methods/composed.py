"""Two methods at once: a token method with a neuron or KV method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from corematching.errors import UserError
from corematching.methods.base import Geometry, Method, Stage


@dataclass(frozen=True)
class Composed(Method):
    """The stages of two methods that reduce different things, run together.

    Raises
    ------
    UserError
        If both reduce the same thing (two token methods, say), since the second would act on what the first left.
    """

    first: Method
    second: Method

    def __post_init__(self) -> None:
        shared = self.first.acts_on & self.second.acts_on
        if shared:
            both = " and ".join(sorted(shared))
            raise UserError(f"cannot compose {self.first.name!r} with {self.second.name!r}: both reduce {both}")

    @property
    def acts_on(self) -> frozenset[str]:  # type: ignore[override]
        return self.first.acts_on | self.second.acts_on

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.first.name}+{self.second.name}"

    @property
    def parameters(self) -> dict[str, Any]:
        return {
            "first": {"name": self.first.name, **self.first.parameters},
            "second": {"name": self.second.name, **self.second.parameters},
        }

    def stages(self, geometry: Geometry) -> list[Stage]:
        return [*self.first.stages(geometry), *self.second.stages(geometry)]
