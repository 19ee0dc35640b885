"""What a method needs besides the model's weights, looked at before those are loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from corematching.engine.predictors import FILE_NAME, PARTS
from corematching.errors import UserError
from corematching.methods.base import Guide, Method, PredictNeurons, VisionOutput
from corematching.models.families import family_of
from corematching.models.loading import load_config
from corematching.models.support import stages_on
from corematching.registry import file_of


def check_methods(methods: Iterable[Method], config: Any, path: str) -> None:
    """Refuse methods that do not fit a model, or whose files are not there.

    Parameters
    ----------
    config, path
        The model's transformers config, and where its weights lie.

    Raises
    ------
    UserError
        Names the parameter and what would be valid.
    """
    seen: set[tuple[Any, str | None]] = set()
    for method in methods:
        for stage in stages_on(config, method):
            if isinstance(stage, PredictNeurons):
                seen.add((_check_predictors, stage.file))
            elif isinstance(stage, Guide):
                seen.add((_check_guide, stage.model))
            elif isinstance(stage, VisionOutput) and stage.text_model is not None:
                seen.add((_check_text_model, stage.text_model))
    for check, name in sorted(seen, key=str):
        check(name, config, path)


def _check_predictors(file: str | None, config: Any, path: str) -> None:
    place = Path(path) / FILE_NAME if file is None else file_of(file)
    shapes: dict[str, list[int]] = {}
    try:
        with safe_open(place, framework="pt") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"predictor={file!r}: there is no predictor file {place.name} for this model; make one with "
            f"python scripts/train_predictors.py --model {Path(path).name or 'NAME'}"
        ) from error
    text = config.text_config
    for layer in range(text.num_hidden_layers):
        first, second, _ = (shapes.get(f"layers.{layer}.{part}", [0, 0]) for part in PARTS)
        if (second[0], first[-1]) != (text.intermediate_size, text.hidden_size):
            raise UserError(f"predictor={file!r}: {place.name} was made for another model (layer {layer} does not fit)")


def _check_guide(guide: str, config: Any, path: str) -> None:
    try:
        own = load_config(guide)
    except UserError as error:
        raise UserError(f"guide={guide!r}: {error}") from error
    families = [(family_of(each), each) for each in (own, config)]
    tokens = [(family.geometry(each).image_tokens, family.image_token_id(each)) for family, each in families]
    if tokens[0] != tokens[1]:
        raise UserError(
            f"guide={guide!r} does not fit: it has {tokens[0][0]} visual tokens per image, the guided model "
            f"{tokens[1][0]}; both must share visual grid and tokenizer"
        )


def _check_text_model(text_model: str, config: Any, path: str) -> None:
    try:
        clip = AutoConfig.from_pretrained(text_model)
        width = clip.vision_config.hidden_size
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"text_model={text_model!r} cannot be loaded as a CLIP model: {reason}") from error
    if clip.model_type != "clip" or width != config.vision_config.hidden_size:
        raise UserError(
            f"text_model={text_model!r} is not the CLIP model that this model's vision tower was taken from "
            f"({clip.model_type} of width {width}, the tower's is {config.vision_config.hidden_size})"
        )
