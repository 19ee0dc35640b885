"""A stored cell computed again: the same where nothing changed, and every difference is named."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
from small_llava import save_small_llava
from synthetic_store import cell_config, cell_record, write_cell

from corematching import cli
from corematching.evaluation import provenance
from corematching.evaluation.again import compute_again
from corematching.results.reading import digest
from corematching.results.seal import sealed

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import reproduce


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    """Folder of a cell made by the program, on data other than the usual."""
    folder = tmp_path_factory.mktemp("again")
    checkpoint = save_small_llava(folder / "model")
    words = [f"model.path={checkpoint}", "model.visual_tokens=64", "generation.max_new_tokens=3", "tracking=none"]
    words += ["name=run", "report=false", "methods=[fastv]", "keep=[16]", "benchmarks=[gqa]", "limit=4", "data.n=8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CM_CACHE", str(folder / "cache"))
        assert cli.main([*words, "data.seed=3", f"results_dir={folder}"]) == 0
        (found,) = (folder / "run/cells").iterdir()
        yield found


def test_a_cell_comes_out_the_same_from_its_own_record(cell, capsys):
    assert reproduce.main([str(cell)]) == 0
    assert capsys.readouterr().out == "made the same way\nsame result\n"


def test_every_difference_is_named(cell, tmp_path, monkeypatch, capsys):
    record = json.loads((cell / "cell.json").read_text())
    samples = pd.read_parquet(cell / "samples.parquet")
    samples.loc[1, "prediction"] = "something else"
    record["score"]["value"] += 1.0
    record["trace"]["flops"]["prefill"] += 1.0
    other = tmp_path / cell.name
    other.mkdir()
    samples.to_parquet(other / "samples.parquet", index=False)
    record.pop("checksums")
    (other / "cell.json").write_text(json.dumps(sealed(record, digest(other / "samples.parquet"))))
    versions = provenance.versions()
    monkeypatch.setattr(provenance, "versions", lambda: {**versions, "torch": "9.9"})
    assert reproduce.main([str(other)]) == 1
    said = capsys.readouterr().out
    assert f"torch: {versions['torch']} then, 9.9 now" in said
    for name in ("score.value", "trace.flops.prefill", "prediction: 1 of 4 differ (question 1: 'something else' then"):
        assert name in said
    assert said.count(" then, ") == 4


def test_a_failure_is_a_difference(cell, monkeypatch):
    from corematching.evaluation.evaluator import Evaluator

    def broken(*_):
        raise RuntimeError("no luck")

    monkeypatch.setattr(Evaluator, "evaluate", broken)
    assert {"status: done then, failed now", "error: None then, no luck now"} <= set(compute_again(cell).result)


def test_what_cannot_be_made_again_is_one_line(cell, tmp_path, capsys):
    config = cell_config("fastv", 64, "gqa", 4)
    config["model"]["name"] = "gone"
    unknown = write_cell(tmp_path, cell_record(config, value=50.0, n=4))
    for folder, why in ((tmp_path / "nothing", "no intact cell"), (unknown, "unknown model 'gone'")):
        assert reproduce.main([str(folder)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert why in line
