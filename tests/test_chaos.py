"""Whole sweeps under random SIGKILLs (scripts/chaos.py): minutes, so only on demand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import chaos


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("executor", ["local", "processes", "ray"])
def test_thirty_kills_lose_and_change_nothing(executor, capsys):
    assert chaos.main(["--executor", executor, "--kills", "30"]) == 0, capsys.readouterr().out
