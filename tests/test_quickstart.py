"""The notebook runs from a clean kernel, offline, and is kept with what it gives."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).parents[1] / "experiments" / "quickstart.ipynb"
FIGURE, PICTURE = "application/vnd.plotly.v1+json", "image/png"
KEPT = nbformat.read(PATH, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    notebook = nbformat.read(PATH, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3")
    return client.execute(cwd=str(tmp_path_factory.mktemp("notebook")))


def outputs(notebook):
    return [each for cell in notebook.cells for each in cell.get("outputs", ())]


def printed(notebook):
    return "".join(each.text for each in outputs(notebook) if each.get("name") == "stdout")


def test_it_is_kept_with_pictures_and_needs_two_imports():
    nbformat.validate(KEPT)
    assert PATH.stat().st_size < 1.5e6
    code = "\n".join(cell.source for cell in KEPT.cells if cell.cell_type == "code")
    nodes = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert len(nodes) == 2
    assert sum(PICTURE in each.get("data", {}) for each in outputs(KEPT)) >= 8
    # What only a live kernel or a script can draw, GitHub cannot.
    assert not any(FIGURE in each.get("data", {}) for each in outputs(KEPT))
    assert all(cell.outputs for cell in KEPT.cells if cell.cell_type == "code")


def test_what_is_kept_is_what_it_gives(executed):
    """Text alike, but for the last cell, whose real model is not everywhere; a picture a figure."""
    before, after = (printed(each).rpartition("confidence")[0] for each in (KEPT, executed))
    numbers = [re.findall(r"-?\d+\.\d+", text) for text in (before, after)]
    assert numbers[0] == numbers[1]
    drawn = sum(FIGURE in each.get("data", {}) for each in outputs(executed))
    assert drawn == sum(PICTURE in each.get("data", {}) for each in outputs(KEPT))


def test_nothing_in_it_asks_for_the_network(executed):
    for notebook in (KEPT, executed):
        pages = [str(each.get("data", {}).get("text/html", "")) for each in outputs(notebook)]
        assert not any(re.search(r"(src|href)=.{0,2}https?:|cdn\.plot\.ly", page) for page in pages)


def test_every_value_has_a_rich_display(executed):
    pages = [
        "".join(o.data["text/html"]) for o in outputs(executed) if "text/html" in o.get("data", {})
    ]
    for words in ("resid_post", "LinearProbe", "certified at least", "examples</b>: accuracy"):
        assert any(words in page for page in pages), words


def test_it_steers_where_that_helps_and_abstains_where_nothing_does(executed):
    text = printed(executed)
    before, after = (float(word) for word in text.split("accuracy ")[1].split()[:3:2])
    assert after > before + 0.05
    assert "ABSTAIN" in text and "There is no folder `model` here" in text
