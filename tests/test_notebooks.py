"""Notebooks: paired with their text form, stripped of outputs, and running from top to bottom."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
#: What the tests make smaller, so that five notebooks run in a minute.
SMALL = {"IMAGES": "2", "KEEPS": "[64, 16]"}


def test_the_five_notebooks_are_there():
    names = ["01_quickstart", "02_core_tokens", "03_matching_evidence", "04_pareto", "05_add_a_method"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_and_text_are_in_step(path):
    notebook, text = nbformat.read(path, 4), jupytext.read(path.with_suffix(".py"))
    cells = [
        [(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in one.cells] for one in (notebook, text)
    ]
    assert cells[0] == cells[1], "run: jupytext --sync notebooks/*.py"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    for cell in nbformat.read(path, 4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, 4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    lines = [line.partition(" = ") for line in parameters.source.splitlines()]
    parameters.source = "\n".join(f"{name} = {SMALL.get(name, value)}" for name, _, value in lines)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER.parent)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown)
