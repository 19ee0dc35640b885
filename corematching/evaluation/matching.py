"""Equal budgets for unequal methods: parameters that give each the same average of visual tokens per decoder layer.

A nominal ``keep`` is not the same budget everywhere: 64 tokens kept from layer 2 on cost more than 64 tokens that enter
the language model. Here a budget is the number of visual tokens entering a decoder layer, averaged over the layers (the
trace's ``average_visual_tokens``), and each method's own parameters follow from it. Counts are whole, so the average is
met to within one token per layer, for methods whose counts come in larger steps (DART, SparseVLM's recycling) to
within half a step. Planning runs on this, so nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corematching.errors import UserError

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """What of a model decides how many tokens enter which layer."""

    tokens: int
    """Visual tokens of one image."""
    layers: int
    """Layers of the decoder."""
    vision_layers: int
    """Layers of the vision tower; features come from the second to last."""


def matched_parameters(name: str, parameters: Parameters, average: int | float, shape: Shape) -> dict[str, Any]:
    """The parameters with which a method's visual tokens per decoder layer average to ``average``.

    Parameters
    ----------
    name
        A method in ``conf/method``; see :data:`MATCHED`.
    parameters
        Its parameters so far: they say at which layers it acts.
    average
        Visual tokens per layer, a count or a fraction of the image's.

    Returns
    -------
    Only the parameters that change.

    Raises
    ------
    UserError
        If no setting reaches the average, since too many tokens pass the layers before the method acts.
    """
    target = average if isinstance(average, int) else average * shape.tokens
    return _RULES[name](name, parameters, target, shape)


# -------------------------------------------------------------------------------------------------- one drop, any layer
def _one_drop(name: str, parameters: Parameters, target: float, shape: Shape, offset: int = 0) -> dict[str, Any]:
    first = _layer(parameters, shape) + offset
    return {"keep": _count_after(name, first, target, shape)}


def _after_its_layer(name: str, parameters: Parameters, target: float, shape: Shape) -> dict[str, Any]:
    return _one_drop(name, parameters, target, shape, offset=1)


def _before_the_llm(name: str, parameters: Parameters, target: float, shape: Shape) -> dict[str, Any]:
    return {"keep": round(target)}


def _held_to_a_budget(name: str, parameters: Parameters, target: float, shape: Shape) -> dict[str, Any]:
    return {"threshold": "keep", **_one_drop(name, parameters, target, shape)}


def _sgl(name: str, parameters: Parameters, target: float, shape: Shape) -> dict[str, Any]:
    return {"keep": _count_after(name, int(shape.layers * parameters["layer_fraction"]), target, shape)}


def _layer(parameters: Parameters, shape: Shape) -> int:
    """The first layer that sees fewer tokens, by the parameters ``layer`` and ``depth_fraction``."""
    layer = _deep_layer(parameters, shape.layers)
    assert layer is not None
    return max(0, layer)


def _count_after(name: str, full: int, target: float, shape: Shape) -> int:
    """Tokens from layer ``full`` on if the layers before see all of them."""
    keep = round((target * shape.layers - full * shape.tokens) / (shape.layers - full))
    if keep < 1:
        raise _out_of_reach(name, full, target, shape)
    return min(keep, shape.tokens)


def _out_of_reach(name: str, full: int, target: float, shape: Shape) -> UserError:
    least = (full * shape.tokens + shape.layers - full) / shape.layers
    return UserError(
        f"{name} cannot reach an average of {target:g} visual tokens per layer: {full} of {shape.layers} layers see "
        f"all {shape.tokens}; give at least {least:.0f} or let it act earlier"
    )


def _dart(name: str, parameters: Parameters, target: float, shape: Shape) -> dict[str, Any]:
    wanted = _count_after(name, _layer(parameters, shape), target, shape)
    pivots = parameters["image_pivots"] + parameters["text_pivots"]
    return {"keep": max(1, pivots * round((wanted - parameters["image_pivots"]) / pivots))}


# ------------------------------------------------------------------------------------------------------- several drops
def _pyramiddrop(name: str, parameters: Parameters, target: float, shape: Shape) -> dict[str, Any]:
    return {"keeps": _geometric(name, parameters["layers"], target, shape)}


def _sparsevlm(name: str, parameters: Parameters, target: float, shape: Shape) -> dict[str, Any]:
    recycles = str(parameters["version"]) == "1.5"
    return {
        "schedule": _geometric(
            name, [layer + 1 for layer in parameters["layers"]], target, shape, _recycled if recycles else None
        )
    }


def _recycled(pruned: int) -> int:
    """Tokens that SparseVLM 1.5 makes of the best 30 % (plus one) of the pruned ones: one per ten, plus one."""
    return (int(0.3 * pruned) + 1) // 10 + 1 if pruned else 0


def _geometric(
    name: str,
    starts: Sequence[int],
    target: float,
    shape: Shape,
    added: Callable[[int], int] | None = None,
) -> list[int]:
    """Kept counts from each of the layers ``starts`` on, each the same share of the one before."""

    def counts(share: float) -> list[int]:
        return [max(1, round(shape.tokens * share ** (step + 1))) for step in range(len(starts))]

    def average(share: float) -> float:
        total, now, previous = 0.0, shape.tokens, 0
        for start, keep in zip(starts, counts(share), strict=True):
            total += now * (start - previous)
            keep = min(keep, now)
            now, previous = keep + (added(now - keep) if added else 0), start
        return (total + now * (shape.layers - previous)) / shape.layers

    shares = [step / 1000 for step in range(1, 1001)]
    best = min(shares, key=lambda share: abs(average(share) - target))
    if abs(average(best) - target) > max(1.0, 0.02 * target):
        raise _out_of_reach(name, starts[0], target, shape)
    return counts(best)


# ------------------------------------------------------------------------------------------------------- vision side
def _prumerge(name: str, parameters: Parameters, target: float, shape: Shape) -> dict[str, Any]:
    """One token is the extra one; half a token more keeps truncation from taking one off."""
    return {"keep_ratio": min(1.0, (max(2, round(target)) - 0.5) / shape.tokens)}


def _prumerge_plus(name: str, parameters: Parameters, target: float, shape: Shape) -> dict[str, Any]:
    def tokens(ratio: float) -> int:
        step = int(1 / ratio)
        return int(ratio * shape.tokens) + len(range(step // 2, shape.tokens - 1, step)) + 1

    ratios = [(top + 0.5) / shape.tokens for top in range(1, shape.tokens // 2)]
    return {"keep_ratio": min(ratios, key=lambda ratio: abs(tokens(ratio) - target))}


def _tome(name: str, parameters: Parameters, target: float, shape: Shape) -> dict[str, Any]:
    """An equal number of merges in every tower layer that matters, as far as half of the tokens allow."""
    goal = shape.tokens - round(target)
    blocks = shape.vision_layers - 1
    for each in range(goal + 1):
        merged: list[int] = []
        for _ in range(blocks):
            left = shape.tokens - sum(merged)
            merged.append(min(each, left // 2, goal - sum(merged)))
        if sum(merged) == goal:
            return {"r": [*merged, 0]}
    raise UserError(
        f"{name} cannot reach {target:g} visual tokens: {blocks} merging layers leave at least "
        f"{shape.tokens >> blocks} of {shape.tokens}"
    )


_RULES: dict[str, Callable[[str, Parameters, float, Shape], dict[str, Any]]] = {
    **dict.fromkeys(("random", "uniform", "pooling", "fastv"), _one_drop),
    **dict.fromkeys(("core_tokens", "corematching"), _held_to_a_budget),
    **dict.fromkeys(("visionzip", "fastervlm", "vtc_cls", "divprune", "cdpruner", "tome_pre_llm"), _before_the_llm),
    "topv": _after_its_layer,
    "dart": _dart,
    "sgl": _sgl,
    "pyramiddrop": _pyramiddrop,
    "sparsevlm": _sparsevlm,
    "prumerge": _prumerge,
    "prumerge_plus": _prumerge_plus,
    "tome": _tome,
}

_FIRST_DROPS: dict[str, Callable[[Parameters, int | None], int | None]] = {
    **dict.fromkeys(
        ("random", "uniform", "pooling", "fastv", "core_tokens", "corematching", "dart"),
        lambda parameters, depth: _deep_layer(parameters, depth),
    ),
    "topv": lambda parameters, depth: parameters["layer"] + 1,
    "sgl": lambda parameters, depth: int(depth * parameters["layer_fraction"]) if depth else None,
    "pyramiddrop": lambda parameters, depth: parameters["layers"][0],
    "sparsevlm": lambda parameters, depth: parameters["layers"][0] + 1,
}


def _deep_layer(parameters: Parameters, depth: int | None) -> int | None:
    fraction = parameters.get("depth_fraction")
    if fraction is None:
        return parameters["layer"]
    return min(depth - 1, max(1, round(fraction * depth))) if depth else None


def dropping_layer(name: str, parameters: Parameters, model: Mapping[str, Any]) -> int | None:
    """The first decoder layer that sees fewer visual tokens; -1 = all of them do.

    None for methods that keep all visual tokens in prefill (KV caches, neurons), and where the layer follows from a
    depth that the model's configuration does not state.
    """
    if name not in _RULES or not parameters.get("tokens", True):
        return None
    depth = model.get("num_layers") or model.get("layers")
    return _FIRST_DROPS[name](parameters, depth) if name in _FIRST_DROPS else -1


MATCHED = tuple(_RULES)
"""Methods with a budget of visual tokens in prefill. The others (KV caches after prefill, neurons) keep all of them."""
