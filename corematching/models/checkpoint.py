"""Read a checkpoint's weights and processor: all of it, or one line that says what is wrong with it.

transformers fills what a checkpoint lacks with random numbers and goes on; results would look like results.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor

from corematching.errors import UserError

_BROKEN = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, EOFError, ImportError),
    *(SafetensorError, pickle.UnpicklingError),
)
"""What reading damaged or foreign files raises, whichever reader it is."""
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json")
_DECODER_LAYER = re.compile(r"(?:^|\.)(?:language_model|text_model)\.(?:model\.)?layers\.(\d+)\.")
_NAMED = 3


def load_weights(path: str, config: Any, dtype: Any, revision: str | None) -> Any:
    """The model with every weight from the checkpoint.

    Layers beyond the configured depth may be left unread; buffers that a model computes itself, and tied weights, need
    not be in the files.

    Raises
    ------
    UserError
        If files are missing or damaged, or weights are missing, left over or of another shape.
    """
    loaded: Any
    try:
        loaded = AutoModelForImageTextToText.from_pretrained(
            path, config=config, dtype=dtype, revision=revision, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except _BROKEN as error:
        raise UserError(f"model '{path}' cannot be loaded ({_first_line(error)}): fetch or save it again") from error
    model, info = loaded
    if faults := _faults(info, config.text_config.num_hidden_layers):
        raise UserError(f"model '{path}' does not fit its config.json: {'; '.join(faults)}")
    return model


def _faults(info: Mapping[str, Any], depth: int) -> list[str]:
    """What transformers found and passed over."""
    unexpected = [key for key in info["unexpected_keys"] if not _beyond(key, depth)]
    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    counted = (
        ("weights missing", info["missing_keys"]),
        ("unexpected weights", unexpected),
        ("weights of another shape", mismatched),
    )
    faults = [f"{len(keys)} {what} ({_some(keys)})" for what, keys in counted if keys]
    return faults + [" ".join(str(text).split())[:200] for text in info["error_msgs"][:1]]


def _beyond(key: str, depth: int) -> bool:
    match = _DECODER_LAYER.search(key)
    return match is not None and int(match[1]) >= depth


def _some(keys: Collection[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def load_processor(path: str, revision: str | None) -> Any:
    """The checkpoint's processor (tokenizer and image processor); None if it comes without one.

    Raises
    ------
    UserError
        If there are files of one, but they are damaged or only a part.
    """
    folder = Path(path)
    local = folder.is_dir()
    if local and not any((folder / name).exists() for name in _PROCESSOR_FILES):
        return None
    try:
        processor = AutoProcessor.from_pretrained(path, revision=revision)
    except Exception as error:  # the tokenizers library raises bare exceptions
        if not local and isinstance(error, OSError):
            return None
        raise UserError(f"the processor of model '{path}' cannot be loaded ({_first_line(error)})") from error
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            raise UserError(f"the processor of model '{path}' has no {part}: files are missing beside config.json")
    return processor


def random_weights(config: Any, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """The architecture with random weights, made directly in the target dtype and on the target device."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), device:
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(config, dtype=dtype)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
