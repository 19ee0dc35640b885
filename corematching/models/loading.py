"""Loading models: by conf/model name, local path or hub id; trained or random weights."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig

from corematching import registry
from corematching.errors import UserError
from corematching.models.assembled import Assembly, assemble
from corematching.models.checkpoint import load_processor, load_weights, random_weights
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
    if not isinstance(name_or_path, str) or not name_or_path.strip() or "\0" in name_or_path:
        raise UserError(f"unknown model {name_or_path!r}: give a name, a local path, or a hub id")
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
    name_or_path: str | PathLike[str],
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
        Unknown model, unsupported family, a bad ``weights``, ``dtype`` or ``num_layers``, or a checkpoint that is
        damaged or does not fit its architecture.
    """
    name = fspath(name_or_path) if isinstance(name_or_path, PathLike) else name_or_path
    config = load_config(name, weights, num_layers, revision)
    path, device = model_path(name), _device(device)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise UserError(f"seed={seed!r} is not valid: give a whole number of at least 0")
    resolved = _dtype(dtype, device, weights)
    if weights == "random":
        model: Any = random_weights(config, resolved, device, seed)
    elif assembly := Assembly.of(path):
        model = assemble(path, assembly, config, config.dtype if resolved == "auto" else resolved).to(device)
    else:
        model = load_weights(path, config, resolved, revision).to(device)
    return model.eval(), _processor(name, path, weights, revision)


def _processor(name: str, path: str, weights: str, revision: str | None) -> Any:
    if weights == "random" and _architecture(name) is not None:
        return None  # asking for one would go looking for a network
    return load_processor(path, revision)


def load_config(
    name: str, weights: str = "pretrained", num_layers: int | None = None, revision: str | None = None
) -> Any:
    """The transformers config of a model, without its weights; parameters as in :func:`load_model`.

    For known names with random weights it is built in, so that nothing is fetched.

    Raises
    ------
    UserError
        Unknown or unavailable model, unsupported family, or a bad ``weights``, ``num_layers`` or ``revision``.
    """
    if weights not in ("pretrained", "random"):
        raise UserError(f"weights={weights!r} is not valid: choose from pretrained, random")
    if revision is not None and (not isinstance(revision, str) or not revision):
        raise UserError(f"revision={revision!r} is not valid: give a branch, tag or commit, or None")
    path, architecture = model_path(name), _architecture(name) if weights == "random" else None
    try:
        if architecture is not None:
            config: Any = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
        else:
            config = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"model {name!r}{'' if revision is None else f' at revision {revision!r}'} is not available "
            f"({str(error).strip().partition(chr(10))[0]}): give a folder that transformers can read, or fetch a model "
            "with scripts/download.py"
        ) from error
    family_of(config)
    if num_layers is not None:
        depth = config.text_config.num_hidden_layers
        if isinstance(num_layers, bool) or not isinstance(num_layers, int) or not 1 <= num_layers <= depth:
            raise UserError(f"num_layers={num_layers!r} is not valid: give 1 to {depth}")
        config.text_config.num_hidden_layers = num_layers
    return config


def _device(device: str | torch.device | None) -> torch.device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        found = torch.device(("cuda" if gpus else "cpu") if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device={device!r} is not valid: give cpu, cuda or cuda:N") from error
    if found.type == "cuda" and (found.index or 0) >= gpus:
        there = f"GPUs 0 to {gpus - 1}" if gpus else "no GPU"
        raise UserError(f"device={str(device)!r} is not valid: this machine has {there}; give cpu, or None")
    return found


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
        dtype = str(dtype).removeprefix("torch.")
    if dtype not in ("float32", "float16", "bfloat16"):
        raise UserError(f"dtype={dtype!r} is not valid: choose from float32, float16, bfloat16")
    return getattr(torch, dtype)
