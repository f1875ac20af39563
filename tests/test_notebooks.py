"""The notebooks run from the first cell to the last, and are kept without outputs."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
SAID = {
    "see-the-cache-work.ipynb": ["tokens in blocks [", "tokens were there", "-1, -1", "blocks in use at most"],
    "choose-a-strategy.ipynb": ["of them fit", "int8         KL", "3 of 3 found", "the closest to exact first: int8"],
}


def test_every_notebook_is_run():
    assert {path.name for path in NOTEBOOKS.glob("*.ipynb")} == set(SAID)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAID)
def test_notebook(name, monkeypatch):
    paths = [str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells), "strip the outputs"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": NOTEBOOKS}}).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    said = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert all(text in said for text in SAID[name]), said
    assert any("image/png" in output.get("data", {}) for output in outputs)
