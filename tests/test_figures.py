"""The gallery is rebuilt from what is committed, without a model."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest

WITHOUT_A_MODEL = ("coverage_of_the_guarantee", "sample_size_curves", "size_of_the_test", "scaling")
"""Figures of simulations, enumerations and timings."""
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import figures  # noqa: E402  found beside the tests, not installed
from figures.__main__ import SCRIPTS  # noqa: E402
from figures.pictures import find_browser, take_picture  # noqa: E402

BUILD = """
import figures, importlib, pathlib, sys
from figures.__main__ import SCRIPTS
for name in SCRIPTS:
    figures.OUT = pathlib.Path(sys.argv[1]) / name
    figures.OUT.mkdir()
    try: importlib.import_module(f"figures.{name}").main()
    except figures.NoResults as absent: (figures.OUT / "absent.txt").write_text(str(absent))
print("transformer_lens" in sys.modules)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The gallery, built by a process that has loaded no model."""
    folder = tmp_path_factory.mktemp("gallery")
    run = [sys.executable, "-c", BUILD, str(folder)]
    done = subprocess.run(run, cwd=ROOT, check=True, timeout=240, capture_output=True, text=True)
    assert done.stdout.split() == ["False"]
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_builds_its_figures_without_a_model(name, built):
    absent = built / name / "absent.txt"
    if absent.exists():
        pytest.skip(absent.read_text())
    pages = list((built / name).glob("*.html"))
    assert pages
    for page in pages:
        spec = json.loads(page.with_suffix(".json").read_text())
        assert spec["data"] and spec["layout"]["title"]["text"]
        # The same method on the same task has other numbers under other settings: they are said.
        settings = spec["layout"]["title"]["subtitle"]["text"]
        measured = re.search(r"organism|smollm2|sms-llama", settings) and re.search(
            r"\d test|examples", settings
        )
        assert measured or page.stem in WITHOUT_A_MODEL, (page.stem, settings)
        kept = ROOT / "figures" / "out" / page.name
        if not kept.exists():
            pytest.skip(f"{page.name} is not in the gallery yet; run `python -m figures`")
        assert kept.read_text() == page.read_text(), f"{page.name} is not what the results give"


def test_functions_of_scripts_are_short():
    """What draws may be a table of options; more than that is a figure of the package."""
    for name in SCRIPTS:
        tree = ast.parse((ROOT / "figures" / f"{name}.py").read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        lengths = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions}
        assert max(lengths.values()) <= 55, (name, lengths)
        assert lengths["main"] <= 25, name


def test_missing_results_say_how_to_get_them():
    with pytest.raises(figures.NoResults, match="python -m experiments.nothing"):
        figures.results("nothing")


@pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")
def test_a_picture_shows_the_figure(tmp_path):
    empty, full = go.Figure(), go.Figure(go.Bar(y=pd.Series(range(40))))
    for figure, name in ((empty, "empty.png"), (full, "full.png")):
        take_picture(figure, tmp_path / name, str(find_browser()))
    sizes = [(tmp_path / name).stat().st_size for name in ("empty.png", "full.png")]
    assert (tmp_path / "full.png").read_bytes().startswith(b"\x89PNG")
    assert sizes[1] > sizes[0] > 1000
