"""The notebook runs from a clean kernel, is short, stripped, and shows what it promises."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).parents[1] / "experiments" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def executed():
    notebook = nbformat.read(PATH, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3")
    return client.execute(cwd=str(PATH.parent))


def shown(notebook, kind: str) -> list[str]:
    """The outputs of one kind, in order."""
    return [
        "".join(output.data[kind])
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type in ("execute_result", "display_data") and kind in output.data
    ]


def test_it_is_short_and_its_outputs_are_stripped():
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 12
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


def test_every_value_has_a_rich_display(executed):
    pages = shown(executed, "text/html")
    for words in ("resid_post", "LinearProbe", "certified at least", "examples</b>: accuracy"):
        assert any(words in page for page in pages), words


def test_it_steers_and_it_helps(executed):
    text = "".join(
        output.text
        for cell in executed.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    )
    before, after = (float(word) for word in text.split("accuracy ")[1].split()[:3:2])
    assert after > before + 0.05


def test_its_figures_and_its_progress_are_there(executed):
    kinds = [
        kind
        for cell in executed.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "data" in output
        for kind in output.data
    ]
    assert sum("plotly" in kind for kind in kinds) >= 2
    words = "".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "")
        for cell in executed.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    assert "steerings" in words  # the bar of the calibration
