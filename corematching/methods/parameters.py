"""Checking parameters: every refusal names the parameter, the value and what is valid."""

from __future__ import annotations

from collections.abc import Sequence

from corematching.errors import UserError

Budget = int | float
"""How much to keep: a count (int) or a kept fraction (float in (0, 1])."""


def check_budget(name: str, keep: Budget | None, *, fraction_only: bool = False) -> None:
    """Refuse a budget that is neither a positive count nor a fraction in (0, 1].

    Raises
    ------
    UserError
        Names the parameter, the value and what is valid.
    """
    valid = "a kept fraction in (0, 1]" if fraction_only else "a count >= 1 or a kept fraction in (0, 1]"
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise UserError(f"{name}={keep!r} is not valid: give {valid}")
    if isinstance(keep, int) and not fraction_only:
        if keep < 1:
            raise UserError(f"{name}={keep} is not valid: give {valid}")
    elif not 0 < keep <= 1:
        raise UserError(f"{name}={keep} is not valid: give {valid}")


def check_count(name: str, keep: Budget, tokens: int) -> None:
    """Refuse a count larger than the number of visual tokens there are."""
    if isinstance(keep, int) and keep > tokens:
        raise UserError(f"{name}={keep} is more than the {tokens} visual tokens of an image: give 1 to {tokens}")


def check_layer(name: str, layer: int, depth: int, first: int = 0) -> int:
    """Refuse a layer outside the model; returns it."""
    if isinstance(layer, bool) or not isinstance(layer, int) or not first <= layer < depth:
        raise UserError(f"{name}={layer!r} is not a layer of this model: valid are {first} to {depth - 1}")
    return layer


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value outside the named choices."""
    if value not in choices:
        raise UserError(f"{name}={value!r} is not valid: choose from {', '.join(choices)}")


def place(layer: int, depth_fraction: float | None, depth: int, first: int = 0) -> int:
    """The layer where a method acts: absolute, or ``depth_fraction`` of the model's depth when that is given."""
    if depth_fraction is not None:
        check_budget("depth_fraction", depth_fraction, fraction_only=True)
        layer = min(depth - 1, max(first, round(depth_fraction * depth)))
    return check_layer("layer", layer, depth, first)


def count_of(keep: Budget, tokens: int) -> int:
    """How many of ``tokens`` a budget keeps: a count is capped, a fraction is truncated but at least 1."""
    if isinstance(keep, int):
        return min(keep, tokens)
    return min(tokens, max(1, int(keep * tokens)))
