"""States of the vision tower on disk: a second sweep over the same pictures skips the tower.

Worth their room where the tower takes longer than reading: on a CPU. A GPU encodes a picture of LLaVA-1.5 in about the
time that its 1.2 MB (577 states of 1,024 numbers in float16, per layer that methods ask about) take to read and copy.

A file is named by everything that decides its content: the picture as preprocessed, the tower's weights and type, the
kind of device, and which of the tower's hidden states it is. It begins with the checksum of the rest, so that a damaged
one is noticed and computed again, and it is written under another name first, so that runs may share a folder. The
least recently used files go when there is no more room.
"""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from corematching.answering.encoding import Encoded
from corematching.models.families import family_of

_DIGEST = 32
_SUFFIX = ".features"
_ROOM = 0.9
"""To which share of the bound a full cache is emptied: looking through a folder for every file would take long."""


@dataclass
class FeatureStore:
    """Tensors by name in a folder of bounded size.

    Attributes
    ----------
    folder
        Made when first written to.
    most_bytes
        Of all files together.
    """

    folder: Path
    most_bytes: int
    _written: int | None = field(default=None, repr=False)
    """Bytes in the folder, about: what others write meanwhile is counted when it is looked through again."""

    def get(self, name: str) -> Tensor | None:
        """A tensor, on the CPU; None if it is not there or damaged."""
        path = self._path(name)
        try:
            content = path.read_bytes()
            if hashlib.blake2b(content[_DIGEST:], digest_size=_DIGEST).digest() != content[:_DIGEST]:
                raise ValueError("damaged")
            found = safetensors.torch.load(content[_DIGEST:])["state"]
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, SafetensorError):
            with suppress(OSError):
                path.unlink()
            return None
        return found

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor if the disk takes it; results do not depend on that."""
        content = safetensors.torch.save({"state": tensor.detach().cpu().contiguous()})
        path = self._path(name)
        temporary = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._written is None:
                self._make_room()
            temporary.write_bytes(hashlib.blake2b(content, digest_size=_DIGEST).digest() + content)
            os.replace(temporary, path)
            self._written = (self._written or 0) + len(content) + _DIGEST
            if self._written > self.most_bytes:
                self._make_room()
        except OSError:
            with suppress(OSError):
                temporary.unlink()

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}{_SUFFIX}"

    def _make_room(self) -> None:
        """Look through the folder; beyond the bound, let the least recently used files go."""
        found = []
        for path in self.folder.glob(f"*/*{_SUFFIX}"):
            with suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        goal = total if total <= self.most_bytes else _ROOM * self.most_bytes
        for _, size, path in sorted(found):
            if total <= goal:
                break
            with suppress(OSError):
                path.unlink()
                total -= size
        self._written = total


class Features:
    """The states of one model's vision tower in a store.

    Parameters
    ----------
    model
        Loaded; its weights must not change afterwards.
    store
        Where.
    """

    def __init__(self, model: Any, store: FeatureStore):
        self.model, self.store = model, store

    @functools.cached_property
    def tower(self) -> str:
        """Names the tower by its content, and where it runs."""
        family = family_of(self.model.config)
        tower: Any = family.tower(self.model)
        known = hashlib.blake2b(f"{self.model.device.type} {tower.config.to_json_string()}".encode(), digest_size=16)
        for name, value in sorted(tower.state_dict().items()):
            known.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            known.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return known.hexdigest()

    def of(self, pictures: Sequence[Encoded]) -> PictureStates:
        """Those of some pictures."""
        return PictureStates(self, [_content(picture) for picture in pictures])


def can_remember(config: Any) -> bool:
    """Whether states can be kept: pictures are rows of one tensor that the tower reads one by one, as in LLaVA-1.5."""
    return family_of(config).image_tokens(config) is not None and isinstance(config.vision_feature_layer, int)


@dataclass
class PictureStates:
    """The tower's states of some pictures; see :class:`corematching.engine.vision.Remembered`."""

    features: Features
    contents: list[str]

    def get(self, index: int) -> Tensor | None:
        """State `index` of all pictures, [N, T, d]; None unless every one is there."""
        found = []
        for content in self.contents:
            state = self.features.store.get(self._name(content, index))
            if state is None:
                return None
            found.append(state)
        return torch.stack(found).to(self.features.model.device)

    def put(self, index: int, states: Tensor) -> None:
        """Remember state `index` of all pictures, [N, T, d]."""
        for content, state in zip(self.contents, states, strict=True):
            self.features.store.put(self._name(content, index), state)

    def _name(self, content: str, index: int) -> str:
        return hashlib.blake2b(f"{self.features.tower} {content} {index}".encode(), digest_size=20).hexdigest()


def _content(picture: Encoded) -> str:
    pixels = picture.inputs["pixel_values"].contiguous()
    head = f"{pixels.dtype} {tuple(pixels.shape)}".encode()
    return hashlib.blake2b(head + pixels.numpy().tobytes(), digest_size=16).hexdigest()
