"""Numeric reference data of the official implementations: a few cases ship here, the rest lie beside the checkout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

SHIPPED = Path(__file__).parent / "goldens"
BESIDE = Path(__file__).parents[2] / "shared" / "goldens"


def golden_cases(side: str, method: str) -> list[str]:
    """Names of a method's cases ("llm" or "vision" side), shipped ones first."""
    found: dict[str, None] = {}
    for root in (SHIPPED, BESIDE):
        found.update(dict.fromkeys(sorted(path.stem for path in (root / side / method).glob("*.safetensors"))))
    return list(found)


def load_case(side: str, method: str, case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and description of one case."""
    root = next(root for root in (SHIPPED, BESIDE) if (root / side / method / f"{case}.safetensors").exists())
    path = root / side / method / f"{case}.safetensors"
    return load_file(path), json.loads(path.with_suffix(".json").read_text())
