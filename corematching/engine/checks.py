"""What a model must be like for a method to be installed on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from corematching.errors import UserError
from corematching.methods.base import AfterPrefill, BeforeLayer, ChooseNeurons, PredictNeurons, Stage

FFN_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


def unwrapped(model: Any) -> Any:
    """The transformers model itself: a PEFT model's adapters act inside its layers, so its shell is taken off.

    Raises
    ------
    UserError
        For adapters that change the prompt instead of the layers, other wrappers, and things that are no model.
    """
    name = type(model).__name__
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        adapters = model.peft_config
        kinds = adapters.values() if isinstance(adapters, dict) else [adapters]
        if any(getattr(kind, "is_prompt_learning", False) for kind in kinds):
            raise UserError(
                f"{name} puts virtual tokens before the prompt, which methods cannot tell from it: merge or remove the "
                "adapter"
            )
        return model.get_base_model()
    if hasattr(model, "_orig_mod"):
        raise UserError(f"{name} is compiled, so replaced parts would not run: give the model before torch.compile")
    if isinstance(getattr(model, "module", None), nn.Module):
        raise UserError(f"{name} wraps a model: give its .module")
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise UserError(f"{name} is not a transformers model: give one, as load_model returns it")
    return model


def check_model(model: nn.Module, decoder: Any, stages: Sequence[Stage]) -> None:
    """Refuse a model whose parts a method would read wrongly.

    Raises
    ------
    UserError
        If modules are compiled; if a method that acts finds sharded weights; if one that reads FFN activations or
        chooses neurons finds an FFN that is not the gated one of transformers.
    """
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        raise UserError("the model is compiled, so replaced parts would not run: use it without model.compile()")
    if not stages:
        return
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise UserError("the model is sharded over devices (tensor parallel): methods need every layer whole on one")
    for path, parameter in decoder.named_parameters():
        if hasattr(parameter, "placements") or hasattr(parameter, "device_mesh"):
            kind = type(parameter).__name__
            raise UserError(f"{path} is sharded ({kind}): methods need every layer's whole weights on one device")
    for layer in sorted({index for stage in stages for index in _ffn_layers(stage)}):
        _check_ffn(layer, decoder.layers[layer].mlp, decoder.config.intermediate_size)


def _ffn_layers(stage: Stage) -> list[int]:
    """Decoder layers whose FFN a stage looks into or changes."""
    if isinstance(stage, BeforeLayer):
        return [stage.layer - 1] if stage.activations else []
    if isinstance(stage, AfterPrefill):
        return [stage.layer] if stage.activations else []
    return [stage.layer] if isinstance(stage, ChooseNeurons | PredictNeurons) else []


def _check_ffn(layer: int, mlp: Any, width: int) -> None:
    kind = type(mlp)
    missing = [part for part in FFN_PARTS if not hasattr(mlp, part)]
    if missing:
        raise UserError(
            f"the FFN of layer {layer} ({kind.__name__}) has no {', '.join(missing)}: it is not a gated FFN"
        )
    if not kind.__module__.startswith("transformers.") or "forward" in vars(mlp):
        raise UserError(
            f"the FFN of layer {layer} ({kind.__name__}) computes something of its own, which choosing neurons would "
            "leave out: use the FFN of transformers"
        )
    found = getattr(mlp.gate_proj, "out_features", None)
    if found != width:
        raise UserError(f"the FFN of layer {layer} has {found} neurons here, not {width}: methods need all of them")
