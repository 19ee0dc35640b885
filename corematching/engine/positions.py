"""Position ids of whatever shape a model is given them in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from corematching.engine.layout import positions_at


@dataclass(frozen=True, eq=False)
class Positions:
    """The positions of some tokens.

    Attributes
    ----------
    rotary
        What the rotary embedding reads: [B or 1, n], or [R, B, n] where it reads several rows (time, height, width).
    text
        [B or 1, n] plain positions, for masks and attention kernels; None where the model gives them none.
    """

    rotary: Tensor
    text: Tensor | None

    @classmethod
    def of(cls, position_ids: Tensor, rows: int, batch: int) -> Positions:
        """Split position ids as the stock decoder does.

        Parameters
        ----------
        position_ids
            [B or 1, n]; or [4, B, n], plain ones before the three rows; or [3 or 1, B, n].
        rows
            How many the model's rotary embedding reads.
        """
        if rows == 1:
            return cls(position_ids, position_ids)
        if position_ids.dim() == 2:
            return cls(position_ids.expand(rows, batch, -1), None)
        if position_ids.shape[0] == rows + 1:
            return cls(position_ids[1:], position_ids[0])
        return cls(position_ids.expand(rows, batch, -1), None)

    @staticmethod
    def text_of(rotary: Tensor) -> Tensor | None:
        """Plain positions where they are the only ones."""
        return rotary if rotary.dim() == 2 else None

    def cut(self, start: int, end: int) -> Positions:
        """Of some tokens in a row."""
        return Positions(self.rotary[..., start:end], None if self.text is None else self.text[..., start:end])

    def along(self, order: Tensor) -> Positions:
        """Of the tokens in another order, long [B, n]."""
        rotary = self.rotary.expand(*self.rotary.shape[:-2], *order.shape)
        text = None if self.text is None else self.text.expand_as(order).gather(1, order)
        return Positions(positions_at(rotary, order), text)

    def minus(self, shift: Tensor) -> Positions:
        """Of the same tokens under a layer's own numbering."""
        rotary = self.rotary - shift
        return Positions(rotary, rotary if rotary.dim() == 2 else self.text)
