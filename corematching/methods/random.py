"""Random control."""

from __future__ import annotations

from dataclasses import dataclass

from corematching.methods.base import Keep
from corematching.methods.control import Control
from corematching.methods.selection import hashed_noise, keep_top, sample_keys
from corematching.methods.views import LayerView


@dataclass(frozen=True)
class Random(Control):
    """Keep random visual tokens: the control every score has to beat.

    The subset depends on the seed and on the prompt's text, not on the sample's place in a batch. Kept tokens keep
    their original position ids.

    Parameters
    ----------
    keep
        Visual tokens to keep per sample (count or fraction).
    layer
        They leave at the input of this decoder layer; -1 = before the LLM.
    seed
        Seed of the choice.
    """

    def select(self, view: LayerView) -> Keep:
        keys = sample_keys(view.prompt.input_ids, view.prompt.valid)
        noise = hashed_noise(keys, view.visual.shape[1], self.seed)
        return keep_top(noise, self.keep, view.visual_valid, view.visual_counts)
