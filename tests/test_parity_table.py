"""The script behind docs/parity.md."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import yaml
from parity import ParityRow
from parity_choices import CHOICES
from parity_choices import table as choices_table

import corematching as cm
from corematching.registry import method_defaults

ROOT = Path(__file__).resolve().parent.parent
GOOD = ParityRow("fastv", "owner/fastv", "0123456789abcdef", "small", True, 2e-6, 1e-4)
INDICES_ONLY = ParityRow("dart", "owner/dart", "abc", "pivots", True, None, 1e-4, "takes a stable order")


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("make_parity", ROOT / "scripts" / "make_parity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def suites(monkeypatch, script):
    """Comparisons that return given rows instead of running models."""

    def given(*rows):
        monkeypatch.setattr(sys, "path", list(sys.path))
        for name, own in zip(script.SUITES, (rows, ()), strict=True):
            suite = types.ModuleType(name)
            suite.cases = lambda goldens, own=own: list(own)
            monkeypatch.setitem(sys.modules, name, suite)

    return given


def test_table_says_what_was_compared(script, suites, tmp_path):
    suites(GOOD, INDICES_ONLY)
    assert script.main(["--goldens", str(tmp_path), "--output", str(tmp_path / "docs" / "parity.md")]) == 0
    text = (tmp_path / "docs" / "parity.md").read_text()
    assert "| `fastv` | owner/fastv | `0123456789` | small | identical | 2.0e-06 | 1e-04 | yes |" in text
    assert "| `dart` | owner/dart | `abc` | pivots | identical | – | 1e-04 | yes |" in text
    assert "- `dart`: takes a stable order" in text
    assert "- `fastv`" not in text


@pytest.mark.parametrize(
    "row",
    [
        ParityRow("fastv", "owner/fastv", "0", "wrong-set", False, 0.0, 1e-4),
        ParityRow("fastv", "owner/fastv", "0", "far-off", True, 2e-4, 1e-4),
    ],
)
def test_a_case_not_reproduced_fails_the_script(row, script, suites, tmp_path, capsys):
    suites(GOOD, row)
    assert script.main(["--goldens", str(tmp_path), "--output", str(tmp_path / "parity.md")]) == 1
    assert f"not reproduced: fastv/{row.case}" in capsys.readouterr().err
    assert "| NO |" in (tmp_path / "parity.md").read_text()


def test_every_choice_names_methods_and_variants_that_exist():
    for choice in CHOICES:
        defaults = method_defaults(choice.method)
        for name, value in re.findall(r"`(\w+)=(\w+)`", choice.variants):
            assert name in defaults, choice
            variant = yaml.safe_load(value)
            assert defaults[name] != variant, choice
            cm.build_method(choice.method, **{name: variant})
    text = (ROOT / "docs" / "parity.md").read_text()
    assert "\n".join(choices_table()) in text


def test_committed_table_covers_every_shipped_case():
    text = (ROOT / "docs" / "parity.md").read_text()
    shipped = [path for path in (ROOT / "tests" / "goldens").glob("*/*/*.json") if path.parent.name != "model"]
    missing = [f"{path.parent.name}/{path.stem}" for path in shipped if f"| {path.stem} |" not in text]
    assert len(shipped) >= 15
    assert not missing
    assert "| NO |" not in text
