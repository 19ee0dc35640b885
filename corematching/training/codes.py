"""The shared code: what each word's embedding is at the start, and which visual token a patch should become.

A word starts as a fixed direction, and the visual token of a patch is trained to be the sum of the directions of what
the patch shows (colour, kind, texture, size, half of the image; on the background its look and mean colour) and of
where it lies. Vision and language can
therefore be trained apart: the language stages read the sums themselves ("oracle" tokens) while the tower still
learns to produce them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from corematching.benchmarks.mini.backgrounds import LOOKS, PATCH
from corematching.benchmarks.mini.drawing import ground_of
from corematching.benchmarks.mini.scenes import COLOURS, DIGITS, GRID, SHAPES, SIZES, TEXTURES, WORDS, Scene
from corematching.training.vocabulary import CORE_WORDS, FUNCTION_WORDS, OPTION_MARKS, PHRASES, SPECIAL, alias_of

KINDS = (*SHAPES, *DIGITS, *WORDS)
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "kind": KINDS,
    "texture": TEXTURES,
    "size": SIZES,
}
_NORMS = {"colour": 7.0, "kind": 7.0, "texture": 5.0, "size": 5.0}
_WORD, _TEXT = 7.0, 4.0  # every word has the same norm, so that the mark of text weighs the same in each
HALF_WORD = _WORD / 2
_ALIAS = 0.35  # own share of a word that means the same as another
MARK_TO_TEXT = _WORD * _ALIAS / _TEXT
_ANCHOR, _BACKGROUND, _HALF = 5.0, 2.0, 3.5
_LOOK, _TINT = 3.0, 2.5  # norm of a background's look; one standard deviation, about, of a background's colour
_SHADES = 4  # mean brightness, two colour differences, contrast
_PLACES = 10


class CodeBook:
    """Fixed directions for words and for what visual tokens say.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
    width : int
        Width of the language model; at least the number of directions needed (about 150).
    seed : int
    """

    def __init__(self, tokenizer, width: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
        names = [*CORE_WORDS, "(text)", "(anchor)", "(background)", *(f"(place {i})" for i in range(_PLACES))]
        names += [*FUNCTION_WORDS, *PHRASES, *OPTION_MARKS, SPECIAL["bos_token"], SPECIAL["eos_token"]]
        grounds = [f"(ground {i})" for i in range(len(LOOKS) + 1 + _SHADES)]
        names += grounds
        names = list(dict.fromkeys(names))
        if len(names) > width:
            raise ValueError(f"the code book needs a width of at least {len(names)}, got {width}")
        self._direction = dict(zip(names, basis))
        self._ground = torch.stack([self._direction[name] for name in grounds])
        self.tokenizer = tokenizer
        self.text = self._direction["(text)"]
        self.mark = self._direction[OPTION_MARKS[0]]  # what all option marks share
        scratch = torch.randn(len(tokenizer), width, generator=generator)
        self._scratch = scratch / scratch.norm(dim=1, keepdim=True)

    def to(self, device: str | torch.device) -> CodeBook:
        """Move all directions to a device, in place; returns itself."""
        self._direction = {name: direction.to(device) for name, direction in self._direction.items()}
        self._scratch, self._ground = self._scratch.to(device), self._ground.to(device)
        self.text, self.mark = self._direction["(text)"], self._direction[OPTION_MARKS[0]]
        return self

    def unit(self, word: str) -> Tensor:
        """The word's direction, a unit vector of shape (width,)."""
        return self._direction[word]

    def embeddings(self) -> Tensor:
        """Initial word embeddings, shape (vocabulary, width): the word's code plus a mark common to all text."""
        return self._codes() + _TEXT * self.text

    def readout(self) -> Tensor:
        """Initial output layer, shape (vocabulary, width): a tenth of the words' codes."""
        return 0.1 * self._codes()

    def _codes(self) -> Tensor:
        rows: list[Tensor] = []
        for token in self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer))):
            index, alias = len(rows), alias_of(token)
            if alias is not None:
                shared = math.sqrt(1 - _ALIAS**2)
                own = self.mark if token in OPTION_MARKS else self._direction[token]
                rows.append(shared * self._direction[alias] + _ALIAS * own)
            else:
                rows.append(self._direction.get(token, self._scratch[index]))
        return _WORD * torch.stack(rows)

    def attribute_codes(self, attribute: str) -> Tensor:
        """Unit directions of an attribute's values, shape (values, width)."""
        return torch.stack([self._direction[value] for value in ATTRIBUTES[attribute]])

    def place_codes(self) -> Tensor:
        """What a visual token says about its place, shape (24, 24, width), rows first: linear and slow waves."""
        axis = (torch.arange(GRID, device=self.text.device) + 0.5) / (GRID / 2) - 1
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        terms = [4 * x, 4 * y]
        for k in (1, 2):
            terms += [f(k * math.pi * v) for v in (x, y) for f in (torch.sin, torch.cos)]
        directions = torch.stack([self._direction[f"(place {i})"] for i in range(_PLACES)])
        return torch.stack(terms, dim=-1) @ directions

    def visual_tokens(self, labels: PatchLabels, rows: Tensor, cols: Tensor) -> Tensor:
        """Target visual tokens, shape (..., width).

        Parameters
        ----------
        labels : PatchLabels
            Attribute indices of shape (...), -1 where absent.
        rows, cols : LongTensor
            Places on the 24 x 24 raster, broadcastable to the labels' shape.
        """
        tokens = self.place_codes()[rows, cols].expand(*labels.shape, -1).clone()
        present = labels.values["colour"] >= 0
        for attribute, norm in _NORMS.items():
            index = labels.values[attribute]
            table = nn.functional.pad(self.attribute_codes(attribute) * norm, (0, 0, 0, 1))
            tokens += table[index]  # index -1 is the row of zeros
        tokens += labels.anchor[..., None] * (_ANCHOR * self._direction["(anchor)"])
        side = torch.stack([self._direction["left"], self._direction["right"]])[(cols >= GRID // 2).long()]
        height = torch.stack([self._direction["top"], self._direction["bottom"]])[(rows >= GRID // 2).long()]
        tokens += present[..., None] * _HALF * (side + height)
        ground = labels.ground @ self._ground + _BACKGROUND * self._direction["(background)"]
        tokens += (~present)[..., None] * ground
        return tokens


class PatchLabels:
    """What each patch of a batch shows.

    Attributes
    ----------
    values : dict of LongTensor
        For each attribute the index of its value, -1 where the patch has none; all of one shape.
    anchor : BoolTensor
        True on the top-left patch of each object (what makes objects countable).
    ground : Tensor
        Look (one-hot, scaled) and shades of what lies behind the objects: the shape of the others, and 11 more.
    """

    def __init__(self, values: dict[str, Tensor], anchor: Tensor, ground: Tensor) -> None:
        self.values, self.anchor, self.ground = values, anchor, ground

    @property
    def shape(self) -> torch.Size:
        """Shape common to all tensors."""
        return self.anchor.shape

    @classmethod
    def of(cls, scenes: Sequence[Scene], grid: int = GRID) -> PatchLabels:
        """Labels of shape (scenes, grid * grid)."""
        values = {name: np.full((len(scenes), grid, grid), -1) for name in ATTRIBUTES}
        anchor = np.zeros((len(scenes), grid, grid), dtype=bool)
        for index, scene in enumerate(scenes):
            for item in scene.objects:
                area = (index, slice(item.row, item.row + item.height), slice(item.col, item.col + item.width))
                values["colour"][area] = ATTRIBUTES["colour"].index(item.colour)
                values["kind"][area] = KINDS.index(item.kind)
                if item.category == "shape":
                    values["texture"][area] = TEXTURES.index(item.texture)
                if item.category != "word":
                    values["size"][area] = SIZES.index(item.size)
                anchor[index, item.row, item.col] = True
        flat = {name: torch.from_numpy(array).flatten(1) for name, array in values.items()}
        ground = np.stack([_ground_features(scene, grid) for scene in scenes])
        return cls(flat, torch.from_numpy(anchor).flatten(1), torch.from_numpy(ground))

    def to(self, device: str | torch.device) -> PatchLabels:
        """A copy on a device."""
        values = {name: value.to(device) for name, value in self.values.items()}
        return PatchLabels(values, self.anchor.to(device), self.ground.to(device))

    def gather(self, index: Tensor) -> PatchLabels:
        """The labels at these patches, shape (scenes, chosen)."""
        ground = self.ground.gather(1, index[..., None].expand(-1, -1, self.ground.shape[-1]))
        return PatchLabels(
            {n: v.gather(1, index) for n, v in self.values.items()}, self.anchor.gather(1, index), ground
        )

    @property
    def present(self) -> dict[str, Tensor]:
        """For colour and kind, which values the image shows: tensors (scenes, values) of 0 and 1."""
        return {
            name: nn.functional.one_hot(self.values[name] + 1, len(ATTRIBUTES[name]) + 1).amax(1)[:, 1:].float()
            for name in ("colour", "kind")
        }


def _ground_features(scene: Scene, grid: int) -> np.ndarray:
    """Look and shades of each patch behind the objects, shape (grid * grid, 11)."""
    canvas, looks = ground_of(scene, grid)
    patches = canvas.reshape(grid, PATCH, grid, PATCH, 3).transpose(0, 2, 1, 3, 4).reshape(grid * grid, -1, 3)
    mean = patches.mean(1)
    grey = mean.mean(1)
    shades = [(grey - 125) / 30, (mean[:, 0] - mean[:, 1]) / 20, (mean[:, 2] - grey) / 15, patches.std((1, 2)) / 15 - 1]
    look = np.eye(len(LOOKS) + 1, dtype=np.float32)[looks.ravel()]
    return np.concatenate([_LOOK * look, _TINT * np.stack(shades, 1).clip(-3, 3)], axis=1).astype(np.float32)
