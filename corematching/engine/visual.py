"""The images of a batch's prompts: which one each visual token belongs to, and where in it the token lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from corematching.errors import UserError
from corematching.models.families import ImageTokens, VisualTokens

if TYPE_CHECKING:
    from corematching.engine.session import Session

FACTS = ("image", "tile", "kind", "row", "column", "tile_rows", "tile_columns")
"""What is known of every visual token; see :class:`corematching.models.families.VisualTokens`."""


@dataclass(frozen=True, eq=False)
class PromptImages:
    """The images of every row of a batch, before any reduction."""

    rows: list[list[ImageTokens]]
    device: torch.device
    numbers: list[list[int]] = field(default_factory=list)
    """Per row: which of the images that came with the batch these are; empty where all images are alike."""

    @cached_property
    def facts(self) -> Tensor:
        """Long [facts, B, V]: :data:`FACTS` by original visual-token index; 0 where a row has fewer tokens."""
        parts = [_facts(own) for own in self.rows]
        width = max(1, *(part.shape[1] for part in parts))
        table = torch.zeros(len(FACTS), len(parts), width, dtype=torch.long)
        for row, part in enumerate(parts):
            table[:, row, : part.shape[1]] = part
        return table.to(self.device)

    def fact(self, name: str, place: Tensor) -> Tensor:
        """A fact of the tokens at long [B, m] original indices (what is no token gets that of the first)."""
        return self.facts[FACTS.index(name)].gather(1, place.clamp(min=0))


def _facts(images: Sequence[ImageTokens]) -> Tensor:
    tokens = VisualTokens.of(images)
    tiles = [[(tile.rows, tile.columns) for tile in image.tiles] for image in images]
    sizes = torch.tensor(
        [tiles[image][tile] for image, tile in zip(tokens.image.tolist(), tokens.tile.tolist(), strict=True)]
    ).reshape(-1, 2)
    return torch.stack([tokens.image, tokens.tile, tokens.kind, tokens.row, tokens.column, *sizes.unbind(1)])


def images_of(session: Session, input_ids: Tensor, counts: list[int]) -> PromptImages:
    """The images of a batch's rows.

    Parameters
    ----------
    counts
        Visual tokens of each row.

    Raises
    ------
    UserError
        If the images do not account for the rows' visual tokens.
    """
    device, config, fixed = input_ids.device, session.model.config, session.geometry.image_tokens
    if fixed is not None:
        one = session.family.image(config)
        return PromptImages([[one] * (count // fixed) for count in counts], device)
    if not any(counts):
        return PromptImages([[] for _ in counts], device)
    images = session.family.images(config, {**session.visual_inputs, "input_ids": input_ids})
    if session.sharing is not None and sum(image.count for image in images) < sum(counts):
        images = [images[number] for number in session.sharing.shown]
    rows = images_by_row([image.count for image in images], counts)
    return PromptImages([[images[number] for number in own] for own in rows], device, rows)


def images_by_row(sizes: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """Which images belong to each batch row; consecutive rows share images where beams were expanded.

    Parameters
    ----------
    sizes
        Visual tokens of each image.
    counts
        Visual tokens of each row.

    Raises
    ------
    UserError
        If they do not fit each other.
    """
    beams = max(1, sum(counts) // max(sum(sizes), 1))
    rows: list[list[int]] = []
    coming = 0
    for count in counts[::beams]:
        own = []
        while count > 0 and coming < len(sizes):
            own.append(coming)
            count -= sizes[coming]
            coming += 1
        if count:
            break
        rows += [own] * beams
    if len(rows) != len(counts) or coming != len(sizes):
        raise UserError(
            f"images of {list(sizes)} visual tokens do not fit prompts with {list(counts)} image tokens: make both "
            "with the model's processor"
        )
    return rows


def tower_tokens(session: Session, images: PromptImages) -> tuple[list[list[list[int]]], list[list[int]]]:
    """What the stock vision tower is given.

    Returns
    -------
    Per layer and sample the lengths of the sequences that its attention runs over, and the tokens of its MLP.
    """
    config, family = session.model.config, session.family
    rows = [[family.tower_sequences(config, image.patches) for image in own] for own in images.rows]
    attended = [
        [[length for image in own for length in image[layer]] for own in rows]
        for layer in range(session.geometry.vision_depth)
    ]
    return attended, [[sum(lengths) for lengths in layer] for layer in attended]
