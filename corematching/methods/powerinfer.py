"""PowerInfer: often active neurons always, predicted ones on demand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corematching.errors import UserError
from corematching.methods.base import Geometry, Method, Neurons, PredictNeurons, Stage
from corematching.methods.parameters import check_budget
from corematching.methods.predictor import Predictor


@dataclass(frozen=True)
class PowerInfer(Method):
    """Hot and cold neurons (PowerInfer, SOSP 2024, arXiv 2312.12456; repository SJTU-IPADS/PowerInfer).

    In decode, the ``hot_fraction`` of neurons that calibration found active most often is computed for every token,
    from contiguous weights; a predictor chooses the rest of ``keep`` among the others, anew for every token. Prefill
    stays dense.

    Difference from the official system: it keeps hot neurons on the GPU and computes cold ones on the CPU; here both
    run where the model is, so this shows the accuracy and the memory traffic of the selection, not the placement. The
    official predictors have a ReLU between their two maps (``scripts/train_predictors.py --relu``; the same file serves
    ``dejavu``, whose form is the default) and threshold their output (an adaptive number of neurons); here the number
    is fixed by ``keep``.

    Parameters
    ----------
    keep
        Kept fraction of the FFN width, hot neurons included.
    hot_fraction
        Fraction of the FFN width that is always computed, at most ``keep``.
    predictor
        File written by ``scripts/train_predictors.py``; None = ``predictors.safetensors`` beside the model.
    """

    keep: float
    hot_fraction: float
    predictor: str | None
    acts_on: ClassVar[frozenset[str]] = frozenset({"neurons"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep, fraction_only=True)
        check_budget("hot_fraction", self.hot_fraction, fraction_only=True)
        if self.hot_fraction > self.keep:
            raise UserError(f"hot_fraction={self.hot_fraction} is not valid: give at most keep={self.keep}")

    def stages(self, geometry: Geometry) -> list[Stage]:
        if self.keep == 1:
            return []
        return [PredictNeurons(layer, self.predict, self.predictor, self.hot) for layer in range(geometry.depth)]

    def hot(self, predictor: Predictor) -> Tensor:
        """Long [h], ascending: the neurons that are always computed."""
        count = max(1, int(len(predictor.frequency) * self.hot_fraction + 1e-9))
        return predictor.frequency.argsort(descending=True, stable=True)[:count].sort().values

    def predict(self, x: Tensor, predictor: Predictor) -> Neurons:
        hot = self.hot(predictor)
        scores = predictor(x).index_fill(1, hot, -torch.inf)
        count = max(1, int(scores.shape[1] * self.keep + 1e-9)) - len(hot)
        return Neurons(scores.topk(count, dim=1).indices.sort(dim=1).values)
