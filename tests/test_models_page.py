"""docs/models.md says what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from corematching.models.families import FAMILIES
from corematching.models.loading import load_config

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_models", ROOT / "scripts" / "make_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_support_matrix_is_the_codes(script):
    text = script.PAGE.read_text(encoding="utf-8")
    assert script.page(text) == text, "stale: run python scripts/make_models.py"
    assert "`fastv` | runs | runs | runs | runs | runs | runs |" in text


def test_the_matrix_has_every_family(script):
    assert {load_config(model, "random").model_type for model in script.MODELS} == set(FAMILIES)
