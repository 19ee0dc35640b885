"""A real run of the bundled model ends with a report that shows which patches each method kept."""

import pytest

from corematching import cli
from corematching.results import overlays


@pytest.mark.slow
def test_a_run_ends_with_tables_figures_report_and_overlays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["name=quickstart", "methods=[dense,fastv]", "keep=[64]", "benchmarks=[gqa]", "limit=4", "tracking=none"]
    assert cli.main([*words, "model=tiny", "data=mini", f"results_dir={tmp_path}"]) == 0
    folder = tmp_path / "quickstart"
    assert (folder / "tables" / "accuracy.tex").is_file()
    assert (folder / "figures" / "layers.pdf").is_file()
    found = overlays.load(folder / overlays.FOLDER)
    answers = found["examples"][0]["answers"]
    assert [(answer["method"], answer["keep"]) for answer in answers] == [("dense", "all"), ("fastv", "64")]
    assert len(answers[1]["stages"][-1]["kept"]) == 64
    assert 'id="overlay-canvas"' in (folder / "report.html").read_text(encoding="utf-8")
