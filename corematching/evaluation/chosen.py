"""The model that a configuration chose: its config for checks, itself for work."""

from collections.abc import Mapping
from typing import Any

import corematching as cm
from corematching.models.loading import load_config


def place_of(chosen: Mapping[str, Any]) -> str:
    """What the model is loaded by: random weights need the architecture in ``conf/model`` only, and nothing else."""
    return chosen["name"] if chosen["weights"] == "random" else chosen["path"]


def config_of(chosen: Mapping[str, Any]) -> Any:
    """Its transformers config, before any weights are loaded."""
    return load_config(place_of(chosen), chosen["weights"], chosen["num_layers"], chosen["revision"])


def load_chosen(chosen: Mapping[str, Any], dtype: str, seed: int) -> tuple[Any, Any]:
    """The model and its processor (None for random weights), in the type that the cells' identity names."""
    return cm.load_model(
        place_of(chosen),
        weights=chosen["weights"],
        dtype=dtype,
        device=None if chosen["device"] == "auto" else chosen["device"],
        num_layers=chosen["num_layers"],
        revision=chosen["revision"],
        seed=seed,
    )
