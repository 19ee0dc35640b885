"""Deja Vu: a predictor chooses each decoded token's neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from corematching.methods.base import Geometry, Method, Neurons, PredictNeurons, Stage
from corematching.methods.parameters import check_budget
from corematching.methods.predictor import Predictor


@dataclass(frozen=True)
class DejaVu(Method):
    """Contextual sparsity (Deja Vu, ICML 2023, arXiv 2310.17157; repository FMInference/DejaVu), FFN part.

    In decode, a low-rank map per layer scores the neurons from the FFN's input, and only the best ``keep`` share is
    computed, anew for every token. Prefill stays dense. Predictors are trained on calibration samples by
    ``scripts/train_predictors.py``, which reports their recall. They have the official form, two linear maps
    without a non-linearity, and the official loss; the script's ``--relu`` makes a variant, and a file says which it
    is.

    **Labels.** The official ones are activations above 0. In the ReLU FFNs they were made for, everything else is 0; in
    the gated FFNs of LLaVA, large activations are negative as well. So predictors are trained to find the largest
    activations by magnitude, which are what decoding needs: measured on a bundled tiny LLaVA they recall 76 % of the
    40 % largest, and with the official labels (``--labels positive``) 48 %, little more than chance.

    The weights of the chosen neurons change with every token, so each step has to gather them: FLOPs fall with
    ``keep``, time need not. Latency tables measure the gathering, FLOPs count the predictor as overhead.

    Differences from the official code: predictors look at the FFN's own input instead of running a layer ahead (which
    hides their time there); attention heads are left alone; samples of a batch choose separately; labels
    (see above).

    Parameters
    ----------
    keep
        Kept fraction of the FFN width.
    predictor
        File written by ``scripts/train_predictors.py``; None = ``predictors.safetensors`` beside the model.
    """

    keep: float
    predictor: str | None
    acts_on: ClassVar[frozenset[str]] = frozenset({"neurons"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep, fraction_only=True)

    def stages(self, geometry: Geometry) -> list[Stage]:
        if self.keep == 1:
            return []
        return [PredictNeurons(layer, self.predict, self.predictor) for layer in range(geometry.depth)]

    def predict(self, x: Tensor, predictor: Predictor) -> Neurons:
        scores = predictor(x)
        count = max(1, int(scores.shape[1] * self.keep + 1e-9))
        return Neurons(scores.topk(count, dim=1).indices.sort(dim=1).values)
