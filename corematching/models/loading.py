"""Loading models: by conf/model name, local path or hub id; trained or random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from corematching import registry
from corematching.errors import UserError
from corematching.models.families import family_of
from corematching.registry import group_names

PACKAGED = "packaged:"
"""Prefix of model paths that lie inside this package."""


def model_path(name_or_path: str) -> str:
    """Where a model lies: the path of a ``conf/model`` name, else the argument itself (local path or hub id).

    Raises
    ------
    UserError
        For something that is neither a known name, an existing path, nor of the form "owner/name".
    """
    if name_or_path in group_names("model"):
        name_or_path = str(OmegaConf.load(registry.CONF / "model" / f"{name_or_path}.yaml").path)
    if name_or_path.startswith(PACKAGED):
        return str(Path(__file__).parent / name_or_path.removeprefix(PACKAGED))
    if not Path(name_or_path).exists() and name_or_path.count("/") != 1:
        raise UserError(
            f"unknown model {name_or_path!r}: choose from {', '.join(group_names('model'))}, a local path, or a hub id"
        )
    return name_or_path


def load_model(
    name_or_path: str,
    weights: str = "pretrained",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    num_layers: int | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Load a vision-language model and its processor, ready for inference.

    Parameters
    ----------
    name_or_path
        A ``conf/model`` name, a local path or a hub id.
    weights
        "pretrained", or "random": the architecture with seeded random weights (nothing is downloaded but the config).
    dtype
        Name or torch dtype; default float32 on CPU, else the checkpoint's (random weights: bfloat16).
    device
        Default: the GPU if there is one.
    num_layers
        Keep only the first decoder layers, at full width; for timing slices on small machines.
    revision
        Hub revision.
    seed
        Seed of random weights.

    Returns
    -------
    (model in eval mode, processor or None if the checkpoint comes without one)

    Raises
    ------
    UserError
        Unknown model, unsupported family, or a bad ``weights``, ``dtype`` or ``num_layers``.
    """
    if weights not in ("pretrained", "random"):
        raise UserError(f"weights={weights!r} is not valid: choose from pretrained, random")
    path = model_path(name_or_path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = _config(name_or_path, path, weights, revision)
    family_of(config)
    if num_layers is not None:
        depth = config.text_config.num_hidden_layers
        if not 1 <= num_layers <= depth:
            raise UserError(f"num_layers={num_layers} is not valid: give 1 to {depth}")
        config.text_config.num_hidden_layers = num_layers
    resolved = _dtype(dtype, device, weights)
    if weights == "random":
        model: Any = _random_model(config, resolved, device, seed)
    else:
        model = AutoModelForImageTextToText.from_pretrained(path, config=config, dtype=resolved, revision=revision)
        model = model.to(device)
    return model.eval(), _processor(name_or_path, path, weights, revision)


def _processor(name: str, path: str, weights: str, revision: str | None) -> Any:
    if weights == "random" and _architecture(name) is not None:
        return None  # asking for one would go looking for a network
    try:
        return AutoProcessor.from_pretrained(path, revision=revision)
    except (OSError, ValueError):
        return None


def _config(name: str, path: str, weights: str, revision: str | None) -> Any:
    """The transformers config: built in for known names with random weights, so that nothing is fetched."""
    architecture = _architecture(name) if weights == "random" else None
    if architecture is not None:
        return AutoConfig.for_model(architecture.pop("model_type"), **architecture)
    try:
        return AutoConfig.from_pretrained(path, revision=revision)
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"model {name!r} is not available ({first}): fetch it with scripts/download.py") from error


def _architecture(name: str) -> Any:
    """The architecture that a ``conf/model`` file spells out, as a dictionary; None if it does not."""
    if name not in group_names("model"):
        return None
    config: Any = OmegaConf.load(registry.CONF / "model" / f"{name}.yaml")
    architecture = config.get("architecture")
    return None if architecture is None else OmegaConf.to_container(architecture)


def _dtype(dtype: str | torch.dtype | None, device: torch.device, weights: str) -> Any:
    if dtype is None:
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if weights == "random" else "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in ("float32", "float16", "bfloat16"):
        raise UserError(f"dtype={dtype!r} is not valid: choose from float32, float16, bfloat16")
    return getattr(torch, dtype)


def _random_model(config: Any, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """The architecture with random weights, made directly in the target dtype and on the target device."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), device:
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(config, dtype=dtype)
