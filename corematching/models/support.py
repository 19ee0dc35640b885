"""Which methods can run on which model families, and why others cannot: asked of a method's stages, not of its name."""

from __future__ import annotations

from typing import Any

from corematching.errors import UserError
from corematching.methods.base import BeforeLayer, Guide, Method, Stage, VisionBlocks, VisionDrop, VisionOutput
from corematching.methods.per_image import of_each_image
from corematching.models.families import Family, family_of


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
    if _slides(config.text_config):
        return "its decoder attends within a sliding window, where tokens that left would be counted as there"
    reasons = (_reason(family, config, stage) for stage in method.stages(family.geometry(config)))
    return next((reason for reason in reasons if reason), None)


def _slides(text: Any) -> bool:
    return getattr(text, "sliding_window", None) is not None or "sliding_attention" in (
        getattr(text, "layer_types", None) or ()
    )


def _reason(family: Family, config: Any, stage: Stage) -> str | None:
    """Why one stage cannot be carried out on a family; None if it can."""
    if isinstance(stage, BeforeLayer):
        if stage.grids and family.newlines:
            return "it needs visual tokens that are plain grids, and newline tokens stand between these"
        return None
    if family.image_tokens(config) is not None:  # every image one grid, every token a patch
        return None
    if isinstance(stage, VisionBlocks | VisionDrop):
        return "patches leave or merge inside the vision tower, whose grid must be whole to make tokens of it"
    if isinstance(stage, Guide):
        return "its guide must see the same visual tokens, and images have numbers of their own here"
    if isinstance(stage, VisionOutput):
        return _output_reason(family, config, stage)
    return None


def _output_reason(family: Family, config: Any, stage: VisionOutput) -> str | None:
    if stage.text_model is not None:
        return "it compares CLIP's embedding of every token with text, and tokens made of several patches have none"
    if stage.inside:
        return "it reads or replaces features between tower and projector, before visual tokens are made of them"
    for layer in stage.layers:
        if not family.sees_whole_images(config, layer):
            return f"it compares attention across the image, and layer {layer} of this tower sees windows only"
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
    geometry = family_of(config).geometry(config)
    return list(of_each_image(method, geometry).stages(geometry))
