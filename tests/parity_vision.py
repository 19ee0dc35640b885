"""Vision-side comparisons with the official implementations' recorded outputs (``goldens/vision``)."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from parity import ParityRow
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

import corematching as cm
from corematching.methods.bipartite import bipartite_match
from corematching.methods.cdpruner import determinantal_picks, relevance
from corematching.methods.dart import add_dissimilar, key_norms, largest
from corematching.methods.divprune import most_diverse

TOLERANCE = 1e-4
IMAGE_TOKEN = 99
PATCHES = 576
PREFIX = 5
"""Text tokens before the image in the prompts made here."""

Outcome = tuple[bool, float | None]
"""Whether all indices agree, and the largest difference of the compared features."""


@functools.cache
def load_tower(folder: Path) -> Any:
    """A LLaVA around the recorded CLIP tower and projector, with a small random language model."""
    text = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "vocab_size": 100,
    }
    config = AutoConfig.for_model(
        "llava",
        vision_config=json.loads((folder / "config.json").read_text()),
        text_config={**text, "num_attention_heads": 4, "num_key_value_heads": 4},
        image_token_id=IMAGE_TOKEN,
        image_seq_length=PATCHES,
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.model.vision_tower.load_state_dict(load_file(folder / "model.safetensors"))
    recorded = load_file(folder / "projector.safetensors")
    projector = {f"linear_{1 + int(key[0]) // 2}{key[1:]}": value for key, value in recorded.items()}
    model.model.multi_modal_projector.load_state_dict(projector)
    return model


@torch.no_grad()
def into_llm(model: Any, method: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Visual tokens [K, d] as they enter the language model's first layer, and their trace [K]."""
    text = torch.arange(3, 3 + PREFIX)
    ids = torch.cat([text, torch.full((PATCHES,), IMAGE_TOKEN), text])[None]
    entered: list[Tensor] = []
    layer = model.model.language_model.layers[0]
    handle = layer.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    try:
        with method(model) as trace:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
    finally:
        handle.remove()
    return entered[0][0, PREFIX:-PREFIX], trace.samples[0].visual_tokens[0].long()


def same(ours: Tensor, golden: Tensor) -> bool:
    return torch.equal(ours.long(), golden)


def gap(ours: Tensor, golden: Tensor) -> float:
    return float("inf") if ours.shape != golden.shape else float((ours - golden).abs().max())


# ---------------------------------------------------------------------------------------------- one function per method
def whole_model(method: Any, golden: dict[str, Tensor], root: Path, case: dict) -> Outcome:
    """Kept patches (the trace's non-negative entries) and the tokens that enter the language model."""
    pixels = load_file(root / case["pixel_values"])["pixel_values"]
    tokens, patches = into_llm(load_tower(root / "model"), method, pixels)
    equal = "kept" not in golden or same(patches[patches >= 0].unique(), golden["kept"])
    return equal, gap(tokens, golden["projected_out"][0])


def visionzip(case: dict, golden: dict[str, Tensor], root: Path) -> Outcome:
    return whole_model(cm.build_method("visionzip", **case["hyperparameters"]), golden, root, case)


def fastervlm(case: dict, golden: dict[str, Tensor], root: Path) -> Outcome:
    keep = case["hyperparameters"]["visual_token_num"]
    return whole_model(cm.build_method("fastervlm", keep=keep), golden, root, case)


def vtc_cls(case: dict, golden: dict[str, Tensor], root: Path) -> Outcome:
    own = case["hyperparameters"]
    parameters = {"layer": own["layer (start_layer)"], "keep": own["token_num"]}
    return whole_model(cm.build_method("vtc_cls", **parameters), golden, root, case)


def prumerge(case: dict, golden: dict[str, Tensor], root: Path) -> Outcome:
    ratio = case["hyperparameters"].get("reduction_ratio")
    return whole_model(cm.build_method(case["method"], keep_ratio=ratio), golden, root, case)


def divprune(case: dict, golden: dict[str, Tensor], root: Path) -> Outcome:
    keep = case["hyperparameters"]["SUBSET_RATIO"]
    equal = same(most_diverse(golden["projected_in"], case["derived"]["kept_tokens"])[0], golden["selection_order"])
    if not (root / case["pixel_values"]).exists():  # not every image ships with the tests
        return equal, None
    kept, difference = whole_model(cm.build_method("divprune", keep=keep), golden, root, case)
    return equal and kept, difference


def tome(case: dict, golden: dict[str, Tensor], root: Path) -> Outcome:
    if case["level"] == "function":
        return tome_function(case, golden)
    own = case["hyperparameters"]
    method = cm.build_method("tome", r=own["r"], proportional_attention=own["prop_attn"])
    return whole_model(method, golden, root, case)


def tome_function(case: dict, golden: dict[str, Tensor]) -> Outcome:
    """Groups and size-weighted means of the matching alone, for every recorded r (no distillation token here)."""
    equal, worst = True, 0.0
    (listed,) = case["hyperparameters"].values()
    for r, class_token, distilled in listed:
        if distilled:
            continue
        tag = f"r{r}" + "_cls" * class_token
        matching = bipartite_match(golden["metric"], r, class_token=class_token)
        assert matching is not None
        index = torch.arange(golden["metric"].shape[1]).expand(golden["metric"].shape[:2])
        merged = matching.merge(golden["x"], golden["size_in"], index)
        # A token's group is where its representative stands in the output; a merged one shares its partner's.
        owner = index.scatter(1, 2 * matching.go, 2 * matching.into + 1)
        group = torch.zeros_like(index).scatter(1, merged.origin, index[:, : merged.origin.shape[1]])
        equal &= same(group.gather(1, owner), golden[f"{tag}.group"])
        worst = max(worst, gap(merged.hidden, golden[f"{tag}.wavg"]), gap(merged.sizes, golden[f"{tag}.wavg_size"]))
    return equal, worst


def cdpruner(case: dict, golden: dict[str, Tensor], root: Path) -> Outcome:
    ours = relevance(golden["image_embeds"], F.normalize(golden["text_embeds"], dim=-1).mean(0, keepdim=True))
    keep = case["hyperparameters"]["visual_token_num"]
    picks = determinantal_picks(golden["projected_in"], ours, keep)[0]
    with torch.no_grad():
        normed = load_tower(root / "model").model.vision_tower.post_layernorm(golden["features_in"])
    embeds = F.linear(normed, golden["visual_projection"])
    worst = max(gap(ours[0], golden["relevance"]), gap(embeds, golden["image_embeds"]))
    return same(picks.sort().values, golden["kept"]), worst


def dart(case: dict, golden: dict[str, Tensor], root: Path) -> Outcome:
    states, image = golden["last_layer_state"], slice(35, 35 + PATCHES)
    position = torch.arange(states.shape[1])[None]
    norms = key_norms(golden["key_states"])
    visual = (position >= image.start) & (position < image.stop)
    pivots = [largest(norms, eligible, 4)[0] for eligible in (visual, position >= image.stop)]
    equal = same(pivots[0] - image.start, golden["image_pivots"]) and same(pivots[1], golden["text_pivots"])
    taken = torch.zeros(1, PATCHES, dtype=torch.bool)
    taken[0, golden["image_pivots"]] = True
    each = torch.tensor([[case["derived"]["TOKEN_TOPK"]]])
    kept = add_dissimilar(states[:, image], states[:, golden["pivot_order"]], taken, each)
    return equal and same(kept[0].nonzero()[:, 0], golden["kept"]), None


CHECKS: dict[str, tuple[Callable[[dict, dict[str, Tensor], Path], Outcome], str]] = {
    "cdpruner": (
        cdpruner,
        "function level (patch embeddings, relevance, selection; text embeddings are recorded ones); relevance is "
        "scaled per image instead of per batch",
    ),
    "dart": (
        dart,
        "function level, against a third-party implementation, given its pivot order (the order of a CPython set); the "
        "method takes image pivots, then text pivots, each by decreasing norm",
    ),
    "divprune": (divprune, "every image has its own selection (officially that of the first sample of the batch)"),
    "fastervlm": (fastervlm, ""),
    "prumerge": (prumerge, "every image of a batch has its own adaptive count (officially shared)"),
    "prumerge_plus": (prumerge, "every image of a batch has its own adaptive count (officially batch 1 only)"),
    "tome": (tome, "the feature layer for LLaVA is a choice made here: ToMe is a classifier's method"),
    "visionzip": (visionzip, ""),
    "vtc_cls": (vtc_cls, ""),
}


def paths(goldens: Path) -> list[Path]:
    """Descriptions of the recorded cases, without re-implementations that differ from the official method."""
    found = sorted(path for method in CHECKS for path in (goldens / "vision" / method).glob("*.json"))
    return [path for path in found if not path.stem.startswith("thirdparty")]


def compare(path: Path) -> ParityRow:
    """Run one recorded case."""
    case = json.loads(path.read_text())
    check, deviations = CHECKS[case["method"]]
    equal, difference = check(case, load_file(path.with_suffix(".safetensors")), path.parent.parent)
    return ParityRow(
        case["method"], case["repository"], case["commit"], path.stem, equal, difference, TOLERANCE, deviations
    )


def cases(goldens: Path) -> list[ParityRow]:
    """Run every recorded case under ``goldens``."""
    return [compare(path) for path in paths(goldens)]
