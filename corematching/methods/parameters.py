"""Checking parameters: every refusal names the parameter, the value and what is valid."""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from corematching.errors import UserError

Budget = int | float
"""How much to keep: a count (int) or a kept fraction (float in (0, 1])."""
_BUDGET = "a count >= 1 or a kept fraction in (0, 1]"
_WORDS = {
    bool: "true or false",
    int: "a whole number (count, layer or seed)",
    float: "a number",
    str: "a text",
    types.NoneType: "null",
}
_LARGEST = 2**31
"""Numbers are smaller: seeds and counts beyond it overflow somewhere."""


def check_types(method: Any) -> None:
    """Hold a method's parameters to their annotations; lists become tuples, so that methods stay hashable.

    Numbers are finite, and no bool is a number.

    Raises
    ------
    UserError
        Names the parameter, the value and what is valid.
    """
    kind: Any = type(method)
    for name, hint in _hints(kind).items():
        value = getattr(method, name)
        if isinstance(value, list) and not _fits(value, hint):
            value = frozen(value)
            object.__setattr__(method, name, value)
        if not _fits(value, hint):
            raise UserError(f"{name}={value!r} is not valid: give {_worded(hint)}")


def frozen(value: Any) -> Any:
    """Lists as tuples, at every depth."""
    return tuple(frozen(item) for item in value) if isinstance(value, list | tuple) else value


@cache
def _hints(cls: Any) -> dict[str, Any]:
    try:
        hints = get_type_hints(cls)
    except NameError:  # a class whose annotations name what only its author's scope knows
        return {}
    return {field.name: hints[field.name] for field in fields(cls)}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation of parameters says; annotations of other kinds hold nothing back."""
    if get_origin(hint) in (types.UnionType, Union):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        items = get_args(hint)
        if not isinstance(value, tuple):
            return False
        if items[-1] is Ellipsis:
            return all(_fits(item, items[0]) for item in value)
        return len(value) == len(items) and all(map(_fits, value, items))
    if hint in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return number and (hint is float or isinstance(value, int)) and abs(value) < _LARGEST
    if hint is str:
        return isinstance(value, str) and "\0" not in value and value.isprintable()
    return isinstance(value, hint) if isinstance(hint, type) else True


def _worded(hint: Any) -> str:
    """An annotation in words."""
    if get_origin(hint) is tuple:
        items = get_args(hint)
        if items[-1] is Ellipsis:
            return f"a list, each {_worded(items[0])}"
        return f"a list of {len(items)}, each {_worded(items[0])}"
    if get_origin(hint) in (types.UnionType, Union):
        options = get_args(hint)
        if set(get_args(Budget)) <= set(options):
            options = (Budget, *(option for option in options if option not in get_args(Budget)))
            if options == (Budget,):
                return _BUDGET
        return ", or ".join(map(_worded, options))
    return _WORDS.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def check_budget(name: str, keep: Budget | None, *, fraction_only: bool = False) -> None:
    """Refuse a budget that is neither a positive count nor a fraction in (0, 1].

    Raises
    ------
    UserError
        Names the parameter, the value and what is valid.
    """
    valid = "a kept fraction in (0, 1]" if fraction_only else _BUDGET
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise UserError(f"{name}={keep!r} is not valid: give {valid}")
    if isinstance(keep, int) and not fraction_only:
        if keep < 1:
            raise UserError(f"{name}={keep} is not valid: give {valid}")
    elif not 0 < keep <= 1:
        raise UserError(f"{name}={keep} is not valid: give {valid}")


def check_count(name: str, keep: Budget, tokens: int | None) -> None:
    """Refuse a count larger than the number of visual tokens there are; None: that differs from image to image."""
    if tokens is not None and isinstance(keep, int) and keep > tokens:
        raise UserError(f"{name}={keep} is more than the {tokens} visual tokens of an image: give 1 to {tokens}")


def check_least(name: str, value: int, least: int = 1) -> None:
    """Refuse a count below the least that makes sense."""
    if value < least:
        raise UserError(f"{name}={value} is not valid: give a count >= {least}")


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


def check_reference(reference: int) -> None:
    """Refuse a reference token that is none of the last 64 of a prompt, counted from the end."""
    if not -64 <= reference <= -1:
        raise UserError(f"reference={reference} is not valid: give -1 (the last prompt token) to -64")


def check_falling(name: str, keeps: Sequence[Budget], tokens: int | None) -> None:
    """Refuse budgets of successive layers of which one keeps more than the one before left.

    Where images differ in their tokens (None), counts are compared with counts and fractions with fractions.
    """
    if tokens is None:
        pairs = [(one, other) for one, other in itertools.pairwise(keeps) if type(one) is type(other)]
    else:
        pairs = list(itertools.pairwise([count_of(keep, tokens) for keep in keeps]))
    if any(later > earlier for earlier, later in pairs):
        raise UserError(f"{name}={list(keeps)} is not valid: a layer cannot keep more than the one before it left")


def spread(count: int, sizes: Sequence[int]) -> list[int]:
    """A count shared out in proportion to ``sizes``, at least one each; what does not divide goes to the largest
    remainders, the first ones on ties. The shares sum to ``count`` if that is at least their number.
    """
    total = sum(sizes)
    shares = [count * size // total for size in sizes]
    remainders = sorted(range(len(sizes)), key=lambda i: (-(count * sizes[i] % total), i))
    for i in remainders[: count - sum(shares)]:
        shares[i] += 1
    while min(shares) < 1 and max(shares) > 1:
        shares[shares.index(max(shares))] -= 1
        shares[shares.index(min(shares))] += 1
    return shares


def count_of(keep: Budget, tokens: int) -> int:
    """How many of ``tokens`` a budget keeps: a count is capped, a fraction is truncated but at least 1."""
    if isinstance(keep, int):
        return min(keep, tokens)
    return min(tokens, max(1, int(keep * tokens)))
