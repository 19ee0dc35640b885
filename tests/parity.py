"""What a comparison with an official implementation's recorded output reports: one row of ``docs/parity.md``.

``parity_vision.py`` and ``parity_llm.py`` hold the comparisons. Each has ``cases(goldens) -> list[ParityRow]``, which
runs every recorded case under ``goldens`` (a folder laid out like ``tests/goldens``: ``vision/``, ``llm/``).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParityRow:
    """How closely one recorded case was reproduced."""

    method: str
    """Name in ``conf/method``."""
    repository: str
    commit: str
    case: str
    indices_equal: bool | None
    """Whether every index tensor of the case came out identical; None if the case has none."""
    max_difference: float | None
    """Largest absolute difference over the compared features, scores or logits; None if only indices are compared."""
    tolerance: float
    """What ``max_difference`` may be at most."""
    deviations: str = ""
    """Known differences between the method and the official code, in words."""

    @property
    def ok(self) -> bool:
        """Reproduced: indices identical and numbers within the tolerance."""
        close = self.max_difference is None or self.max_difference <= self.tolerance
        return self.indices_equal is not False and close
