"""What a single method is shown beside: dense, and a random choice of what the method chooses, where it does so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corematching import groups
from corematching.evaluation.matching import dropping_layer
from corematching.registry import method_defaults

CONTROLS = (True, "dense", False)
"""Values of the setting ``controls``: dense and random | dense alone | neither."""
NEURON_METHODS = ("core_neurons", "coreinfer", "dejavu", "powerinfer", "wanda_neurons")
"""Methods that choose FFN neurons and nothing else: their random control chooses neurons."""


def with_controls(entry: Mapping[str, Any], model: Mapping[str, Any], controls: bool | str) -> list[dict[str, Any]]:
    """The entry of one method, behind its controls.

    Parameters
    ----------
    entry
        As in ``methods``: a name and the parameters that were given.
    model
        The model's configuration; its depth decides where some methods drop.
    controls
        One of :data:`CONTROLS`.
    """
    entries = [dict(entry)]
    name = entry["name"]
    if controls is True and name != "random" and name in groups.choices("method"):
        overrides = (model.get("method_overrides") or {}).get(name) or {}
        try:
            layer = dropping_layer(name, {**method_defaults(name), **overrides, **entry}, model)
        except (TypeError, ValueError, LookupError, OverflowError):
            layer = None  # the method itself will say what is wrong with its parameters
        if isinstance(layer, int):
            own = {"keep": entry["keep"]} if entry.get("keep") is not None else {}
            entries.insert(0, {"name": "random", "label": random_label(layer), "layer": layer, **own})
    if controls is True and name in NEURON_METHODS:
        keep = entry.get("keep", method_defaults(name)["keep"])
        entries.insert(0, {"name": "random_neurons", "keep": keep})
    if controls is not False and name != "dense":
        entries.insert(0, {"name": "dense"})
    return entries


def random_label(layer: int) -> str:
    """How tables call the random control that drops at a layer (-1 or 0: before the LLM)."""
    return "random" if layer < 1 else f"random (layer {layer})"
