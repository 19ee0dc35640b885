"""Language-side comparisons with the official implementations' recorded outputs (``goldens/llm``)."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from parity import ParityRow
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling

import corematching as cm
from corematching.engine.ffn import SlicedFFN
from corematching.methods.coreinfer import most_counted, token_counts

LOGITS = 1e-3


@functools.cache
def load_tiny(folder: Path) -> Any:
    """The random LLaVA the cases were recorded with, in float32."""
    return AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32).eval()


@torch.no_grad()
def run(model: Any, method: cm.registry.Method, golden: dict[str, Tensor]) -> tuple[Any, Tensor, list[int]]:
    """Prefill trace, last logits and eight greedy tokens of a recorded prompt."""
    ids = golden["input_ids"]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "image_features" in golden:
        # Cases kept in this repository hold the projected features instead of the much larger pixels.
        inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=[golden["image_features"]])}
    else:
        inputs["pixel_values"] = golden["pixel_values"].float()
    with method(model) as trace:
        output = model.generate(
            **inputs,
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return trace.samples[0], output.logits[0][0], output.sequences[0, ids.shape[1] :].tolist()


def same(kept: Tensor, golden: Tensor) -> bool:
    return torch.equal(kept.long(), golden)


# ---------------------------------------------------------------------------------------------- one function per method
Outcome = tuple[bool, float]
"""Whether all indices agree, and the largest difference of the compared numbers."""


def whole_model(
    method: cm.registry.Method, kept: Callable[[Any], bool], golden: dict[str, Tensor], model: Any
) -> Outcome:
    """Compare kept sets (``kept`` judges the trace), greedy tokens and the last logits."""
    trace, logits, tokens = run(model, method, golden)
    equal = kept(trace) and tokens == golden["greedy_ids"].tolist()
    return equal, float((logits - golden["logits_last"]).abs().max())


def fastv(case: dict, golden: dict[str, Tensor], model: Any) -> Outcome:
    layer, keep = case["hyper_parameters"]["K"], len(golden["kept"])
    method = cm.build_method("fastv", layer=layer, keep=keep)
    return whole_model(method, lambda trace: same(trace.visual_tokens[layer], golden["kept"]), golden, model)


def corematching_release(case: dict, golden: dict[str, Tensor], model: Any) -> Outcome:
    zeroed = sum(576 - len(golden[f"kept_layer_{layer}"]) for layer in range(5, 19))
    method = cm.build_method("corematching_release")
    return whole_model(method, lambda trace: trace.zeroed_kv == zeroed, golden, model)


def sparsevlm(case: dict, golden: dict[str, Tensor], model: Any) -> Outcome:
    parameters = case["hyper_parameters"]
    method = cm.build_method(
        "sparsevlm",
        version=case["version"][:3].replace("_", "."),
        keep=parameters["RETAIN_TOKN"],
        layers=parameters["pruning_loc"],
        priority_heads=parameters.get("priority_heads", 14),
    )

    def kept(trace: Any) -> bool:
        slots = [golden[f"slots_after_layer_{layer}"].clamp(min=-1).sort().values for layer in method.layers]
        return all(same(trace.visual_tokens[layer + 1], own) for layer, own in zip(method.layers, slots, strict=True))

    return whole_model(method, kept, golden, model)


def pyramiddrop(case: dict, golden: dict[str, Tensor], model: Any) -> Outcome:
    parameters = case["hyper_parameters"]
    layers = parameters["layer_list"]
    method = cm.build_method("pyramiddrop", layers=layers, keeps=parameters["image_token_ratio_list"])

    def kept(trace: Any) -> bool:
        return all(same(trace.visual_tokens[layer], golden[f"kept_layer_{layer}"]) for layer in layers)

    return whole_model(method, kept, golden, model)


def coreinfer(case: dict, golden: dict[str, Tensor], model: Any) -> Outcome:
    """One layer at function level: counts, chosen neurons, and the sliced FFN on the official choice."""
    parameters = case["hyper_parameters"]
    gate, up, down = (golden[f"{name}_weight"] for name in ("gate", "up", "down"))
    hidden = golden["h_prefill"]
    activations = silu(linear(hidden, gate)) * linear(hidden, up)
    valid = torch.ones(hidden.shape[:2], dtype=torch.bool)
    counts = token_counts(activations, valid, parameters["token_sparsity"])[0]
    width = int(len(counts) * parameters["sparsity"])
    chosen = most_counted(counts[None], width).index[0]
    # Which of the neurons tied at the boundary are kept depends on the machine in the official code: compare counts.
    official = golden["indices"]
    equal = torch.equal(counts, golden["counts"])
    equal &= torch.equal(counts[chosen].sort().values, counts[official].sort().values)
    if not case["selection_boundary_gap"]["tie_at_boundary"]:
        equal &= torch.equal(chosen, official.sort().values)

    mlp = SimpleNamespace(act_fn=silu)
    for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        setattr(mlp, name, SimpleNamespace(weight=weight, bias=None))
    answer = SlicedFFN(mlp, official.sort().values)(golden["h_decode"])
    return bool(equal), float((answer - golden["decode_out"]).abs().max())


# ----------------------------------------------------------------------------------------------------------- the table
DEVIATIONS = {
    "fastv": "",
    "corematching_release": "image slice 5:581 generalised to the visual span",
    "sparsevlm": "ties in the clustering go by order instead of random noise",
    "pyramiddrop": "",
    "coreinfer": "ties at the boundary are left to `torch.argsort`, as officially: machines differ",
}


def recorded(goldens: Path) -> list[tuple[str, Path]]:
    """Method and JSON file of every case under ``goldens/llm``."""
    return [(method, path) for method in DEVIATIONS for path in sorted((goldens / "llm" / method).glob("*.json"))]


def compare(method: str, path: Path) -> ParityRow:
    """Run one recorded case again."""
    case, golden = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    equal, difference = globals()[method](case, golden, load_tiny(path.parent.parent))
    return ParityRow(
        method, case["repository"], case["commit"], case["case"], equal, difference, LOGITS, DEVIATIONS[method]
    )


def cases(goldens: Path) -> list[ParityRow]:
    """Every recorded case under ``goldens/llm``."""
    return [compare(method, path) for method, path in recorded(goldens)]
