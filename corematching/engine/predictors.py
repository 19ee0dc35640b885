"""Decode-time FFNs whose neurons a predictor chooses anew for every token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from corematching import files
from corematching.engine.ffn import FFNBuilder, MaskedFFN, SlicedFFN, sliceable
from corematching.engine.state import PromptState
from corematching.errors import UserError
from corematching.methods.base import PredictNeurons
from corematching.methods.predictor import Predictor
from corematching.registry import file_of

FILE_NAME = "predictors.safetensors"
PARTS = ("first", "second", "frequency")
FORM = "form"
"""Metadata entry that says what stands between the two maps."""


def save_predictors(path: Path, predictors: Mapping[int, Predictor], notes: Mapping[str, str]) -> None:
    """Write one predictor per layer, all of one form; ``notes`` go into the file's metadata."""
    tensors = {
        f"layers.{layer}.{part}": getattr(predictor, part).half().contiguous()
        for layer, predictor in predictors.items()
        for part in PARTS
    }
    with files.replacing(path) as temporary:
        save_file(tensors, temporary, {**notes, FORM: _form(any(made.relu for made in predictors.values()))})


def _form(relu: bool) -> str:
    return "linear-relu-linear" if relu else "linear-linear"


def load_predictors(file: str | None, model: Any, decoder: Any) -> dict[int, Predictor]:
    """The predictors of every layer, in the model's dtype and on its device.

    Parameters
    ----------
    file
        Path, or None for ``predictors.safetensors`` in the folder the model was loaded from.

    Raises
    ------
    UserError
        If there is no such file (says how to make one), it does not say its form, or it was made for another model.
    """
    path = Path(model.config._name_or_path) / FILE_NAME if file is None else file_of(file)
    try:
        with safe_open(path, "pt") as opened:
            form = (opened.metadata() or {}).get(FORM)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"predictor={file!r}: there is no predictor file {path.name} for this model; make one with "
            f"python scripts/train_predictors.py --model {Path(model.config._name_or_path).name or 'NAME'}"
        ) from error
    if form not in (_form(False), _form(True)):
        raise UserError(f"predictor={file!r}: {path.name} does not say its form: make it again with the script")
    predictors = {}
    for index, layer in enumerate(decoder.layers[: decoder.config.num_hidden_layers]):
        gate = layer.mlp.gate_proj
        parts = [tensors[name] for name in (f"layers.{index}.{part}" for part in PARTS) if name in tensors]
        if len(parts) < len(PARTS) or (len(parts[1]), parts[0].shape[1]) != (gate.out_features, gate.in_features):
            raise UserError(f"predictor={file!r}: {path.name} was made for another model (layer {index} does not fit)")
        like = gate.weight if sliceable(layer.mlp) else layer.post_attention_layernorm.weight
        device = "cpu" if like.device.type == "meta" else like.device
        weights = dict(zip(PARTS, (part.to(device, like.dtype) for part in parts), strict=True))
        values: dict[str, Any] = {**weights, "relu": form == _form(True)}
        predictors[index] = Predictor(**values)
    return predictors


class TokenwiseFFN:
    """A gated FFN in which a predictor chooses each token's neurons, next to some that every token uses.

    Parameters
    ----------
    mlp
        Module with ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``.
    stage
        Its ``predict`` chooses; its ``always`` names the neurons that every token uses.
    predictor
        The layer's predictor.
    build
        Makes the FFN of a single step.
    """

    def __init__(self, mlp: Any, stage: PredictNeurons, predictor: Predictor, build: FFNBuilder) -> None:
        self.mlp, self.stage, self.predictor, self.build = mlp, stage, predictor, build
        self.hot = None if stage.always is None else stage.always(predictor)
        self._hot_ffn: SlicedFFN | MaskedFFN | None = None
        if self.hot is not None:
            self._hot_ffn = SlicedFFN(mlp, self.hot) if sliceable(mlp) else MaskedFFN(mlp, self.hot[None], "whole")

    def __call__(self, x: Tensor, state: PromptState) -> Tensor:
        """[B, q, d] -> [B, q, d]; notes the last token's choice, and what predicting cost, in ``state``."""
        if self.predictor.first.device != x.device:  # of a layer whose weights come and go
            self.predictor = _moved(self.predictor, x.device)
            self.hot = None if self.hot is None else self.hot.to(x.device)
            if self._hot_ffn is not None:
                self._hot_ffn = MaskedFFN(self.mlp, self.hot[None], "whole")  # type: ignore[index]
        tokens = x.flatten(0, 1)
        index = self.stage.predict(tokens, self.predictor).index
        ffn = self.build.once(self.mlp, index)
        answer = ffn(tokens[:, None])[:, 0].unflatten(0, x.shape[:2])
        chosen = index
        if self._hot_ffn is not None and self.hot is not None:
            answer = answer + self._hot_ffn(x)
            if getattr(self.mlp.down_proj, "bias", None) is not None:
                nothing = x.new_zeros(1, 1, self.mlp.down_proj.in_features)
                answer = answer - self.mlp.down_proj(nothing)  # the bias: both parts added it
            chosen = torch.cat([index, self.hot.expand(len(index), -1)], 1).sort(dim=1).values
        layer = self.stage.layer
        state.neurons[layer], state.ffn[layer] = chosen.unflatten(0, x.shape[:2])[:, -1], ffn
        state.ledger.spend(self.predictor.flops * x.shape[1])
        return answer


def _moved(predictor: Predictor, device: torch.device) -> Predictor:
    values = {field.name: getattr(predictor, field.name) for field in fields(predictor)}
    moved: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(predictor, **moved)
