"""Which methods can run on which model families, and why others cannot: asked of a method's stages, not of its name."""

from __future__ import annotations

from typing import Any

from corematching.errors import UserError
from corematching.methods.base import Guide, Method, Stage, VisionBlocks, VisionDrop, VisionOutput
from corematching.models.families import family_of


def refusal(config: Any, method: Method) -> str | None:
    """Why a method cannot run on a model, in one line; None if it can.

    Parameters
    ----------
    config
        The model's transformers config.

    Raises
    ------
    UserError
        If the method's parameters do not fit the model.
    """
    family = family_of(config)
    if family.model_type == "llava":
        return None
    kinds = {type(stage) for stage in method.stages(family.geometry(config))}
    if VisionBlocks in kinds:
        return "it merges patches inside the vision tower, and tokens are no single patches there"
    if VisionDrop in kinds:
        return "its patches leave between blocks of a CLIP tower, and this family runs its tower by itself"
    if VisionOutput in kinds:
        return "it chooses at the vision tower's output, which this family packs before the decoder"
    if Guide in kinds:
        return "its guide must see the same visual tokens, and no small model of this family does"
    return None


def stages_on(config: Any, method: Method) -> list[Stage]:
    """Where a method acts on a model.

    Raises
    ------
    UserError
        If it cannot run there, or its parameters do not fit.
    """
    if reason := refusal(config, method):
        raise UserError(f"method {method.name!r} does not run on {config.model_type} models: {reason}")
    return list(method.stages(family_of(config).geometry(config)))
