"""A page in a real browser: every figure drawn, nothing complained, hover and legend alive.

Skipped where no Chromium is installed.
"""

import re
import subprocess

import pandas as pd
import pytest
from chromium import BROWSER, Chromium
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from test_plots import FIGURES, evidence

from mera_tl import plots
from mera_tl.report import html, render

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

PROBE = """
<script>
const say = (name, value) => document.documentElement.setAttribute("data-" + name, value);
const point = (place, x, y, kinds) => {
  const at = { clientX: x, clientY: y, bubbles: true, view: window };
  for (const kind of kinds) place.dispatchEvent(new MouseEvent(kind, at));
};
const wait = () => new Promise(resolve => setTimeout(resolve, 500));
window.addEventListener("load", () => setTimeout(() => {
  const plot = document.getElementById("curve");
  const scrolls = [...document.querySelectorAll(".scroll")];
  say("widest", Math.max(...scrolls.map(place => place.getBoundingClientRect().width)));
  const { xaxis, yaxis } = plot._fullLayout, star = plot.calcdata.at(-1)[0];
  const { left, top } = plot.getBoundingClientRect();
  const x = left + xaxis._offset + xaxis.l2p(star.x);
  const y = top + yaxis._offset + yaxis.l2p(star.y);
  plot.on("plotly_hover", event => say("hovered", event.points.at(-1).y));
  point(plot.querySelector(".nsewdrag"), x, y, ["mouseover", "mousemove"]);
  wait().then(() => {
    say("hovertext", plot.querySelectorAll(".hovertext").length);
    point(plot.querySelectorAll(".legendtoggle")[1], 0, 0, ["mousedown", "mouseup"]);
  }).then(wait).then(wait).then(() => say("visible", plot.data[1].visible));
}, 1500));
</script>
"""


def dump(page, *, width: int = 1280, dark: bool = False) -> str:
    """The document as it stands after its scripts have run."""
    command = [
        str(BROWSER),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={page.parent / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--window-size={width},2000",
        "--virtual-time-budget=15000",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def root(text: str, name: str) -> str | None:
    found = re.search(rf'<html[^>]* data-{name}="([^"]*)"', text)
    return found and found.group(1)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("browser") / "page.html"
    text = render("All figures", FIGURES).replace("</body>", PROBE + "</body>")
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["light", "dark"])
def text(page, request):
    return dump(page, dark=request.param == "dark")


def test_every_figure_is_drawn_without_complaint(text):
    assert root(text, "problems") is None
    assert text.count('data-drawn="yes"') == len(FIGURES)
    assert text.count('class="main-svg"') >= len(FIGURES)


def test_hovering_and_clicking_the_legend_work(text):
    assert float(str(root(text, "hovered"))) == pytest.approx(0.765)
    assert int(str(root(text, "hovertext"))) >= 1
    assert root(text, "visible") == "legendonly"


def test_a_narrow_page_has_no_sideways_scroll(page):
    narrow = page.with_name("narrow.html")
    # Chromium's narrowest window is 500 pixels.
    narrow.write_text(page.read_text("utf-8").replace("<body>", '<body style="width:400px">'))
    text = dump(narrow, width=500)
    assert text.count('data-drawn="yes"') == len(FIGURES)
    assert float(str(root(text, "widest"))) <= 400


def test_a_broken_figure_is_noticed(page):
    """The control: the tests above would see a figure that fails."""
    figure = plots.steering_curve(evidence())
    text = render("Broken", {"curve": figure})
    broken = page.with_name("broken.html")
    broken.write_text(text.replace("figures[place.id]", "figures[place.id].nothing"))
    found = dump(broken)
    assert root(found, "problems") is not None
    assert 'data-drawn="yes"' not in found


BODY = """{% extends 'page.html' %}{% block body %}{{ parts.slider(slider, 'threshold') }}
{{ parts.one_at_a_time(layers) }}{{ parts.explorer(examples, 'explorer') }}
{{ parts.figure(errors) }}{{ parts.table(methods) }}{{ parts.command(command) }}{% endblock %}"""
COMMAND = "mera run -m organism \\\n  -t spam_cue"


def report_page(folder):
    """A page with everything on it that answers to a click."""
    rows = [
        {"row": i, "label": "a", "change": change, "before": "b", "after": "a", "reply": None}
        | {"error_before": 0.9 - i / 10, "error_after": 0.1, "prompt": f"prompt {i}"}
        | {"p_before": [0.1, 0.9], "p_after": [0.9, 0.1]}
        | {"predicted": [[0, 0.2, 0.2], [1, 0.9, 0.35]]}
        for i, change in enumerate(["0->1", "0->1", "1->0"])
    ]
    points = pd.DataFrame(
        {
            "row": range(3),
            "before": [0.9, 0.8, 0.7],
            "after": 0.1,
            "change": ["0->1"] * 2 + ["1->0"],
        }
    )
    figures = {
        "predicted": FIGURES["predicted"],
        "predicted_1": FIGURES["predicted"],
        "errors": plots.error_before_after(points, method="searched"),
    }
    blocks = {name: html.block_of(name, figure) for name, figure in figures.items()}
    marks = [{"predicted": (0.1, None)}, {"predicted": (0.5, None)}]
    slider = {"labels": ["0.1", "0.5"], "says": ["3 recovered", "1 recovered"], "marks": marks}
    methods = pd.DataFrame({"method": ["b", "a", "c"], "accuracy": [0.5, float("nan"), 0.125]})
    text = (
        html.environment()
        .from_string(BODY)
        .render(
            title="Examples",
            blocks=[],
            specs={name: html._bare(figure) for name, figure in figures.items()},
            plotly=Markup(get_plotlyjs()),
            slider=slider | {"chosen": 1, "note": ""},
            layers=[(0, blocks["predicted"]), (1, blocks["predicted_1"])],
            examples={"options": ["a", "b"], "rows": rows},
            errors=blocks["errors"],
            methods=html.Table.of(methods),
            command=COMMAND,
        )
    )
    page = folder / "page.html"
    page.write_text(text, encoding="utf-8")
    return page


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    page = report_page(tmp_path_factory.mktemp("clicks"))
    with Chromium() as browser:
        tab = browser.tab(page.as_uri())
        tab.wait("document.querySelectorAll('[data-drawn=yes]').length === 2")
        yield tab
        assert tab.run("document.documentElement.dataset.problems") is None


def texts(tab, selector):
    return tab.run(f"[...document.querySelectorAll('{selector}')].map(e => e.textContent)")


def pick(tab, selector, value):
    where = f"document.querySelector('{selector}')"
    tab.run(f"{where}.value = '{value}'; {where}.dispatchEvent(new Event('change'))")


def test_examples_are_sorted_and_filtered(tab):
    firsts = ".explorer tbody td:first-child"
    assert texts(tab, firsts) == ["0", "1", "2"]
    tab.click(".explorer th:nth-child(5) button")
    assert texts(tab, firsts) == ["2", "1", "0"]  # by error before
    tab.click(".explorer th:nth-child(5) button")
    assert texts(tab, firsts) == ["0", "1", "2"]
    assert tab.run("document.querySelector('.explorer [aria-sort]').textContent") == "error"
    pick(tab, ".explorer .kind", "regressed")
    assert texts(tab, firsts) == ["2"]
    pick(tab, ".explorer .kind", "all")
    tab.click(".explorer .words")
    tab.type("prompt 1")
    assert texts(tab, firsts) == ["1"] and texts(tab, ".shown") == ["1 of 3"]
    tab.run("document.querySelector('.words').value = ''")
    pick(tab, ".explorer .kind", "changed")


def test_a_row_or_a_point_shows_prompt_options_and_the_strip_of_layers(tab):
    tab.click(".explorer tbody tr:nth-child(2)")
    assert texts(tab, ".detail pre") == ["prompt 1"]
    assert len(texts(tab, ".detail .bar")) == 4
    assert texts(tab, ".strip div") == ["layer 00.20 → 0.20", "layer 10.90 → 0.35"]
    assert texts(tab, ".strip .moved") == ["layer 10.90 → 0.35"]
    tab.run("document.querySelector('#errors').scrollIntoView()")
    at = tab.run(
        "(p => { const [d] = p.calcdata[3], f = p._fullLayout, b = p.getBoundingClientRect();"
        "return [b.x + f.xaxis._offset + f.xaxis.l2p(d.x), b.y + f.yaxis._offset"
        " + f.yaxis.l2p(d.y)]; })(document.querySelector('#errors'))"
    )
    tab.click("", at=tuple(at))
    tab.wait("document.querySelector('.detail pre').textContent === 'prompt 2'", seconds=5)


def test_the_threshold_moves_the_line_and_the_counts(tab):
    lines = "document.querySelector('#predicted').layout.shapes.map(s => s.x0)"
    assert texts(tab, ".slider .says") == ["1 recovered"]
    before = tab.run(lines)
    tab.run("document.querySelector('.slider input').focus()")
    tab.press("ArrowLeft")
    assert texts(tab, ".slider .says") == ["3 recovered"] and texts(tab, ".slider .at") == ["0.1"]
    assert tab.run(lines) == [*before[:2], 0.1]


def test_one_layer_is_drawn_at_a_time(tab):
    seen = "[...document.querySelectorAll('.one-layer')].map(e => e.offsetHeight > 0)"
    assert tab.run(seen) == [True, False]
    pick(tab, "select.layer", "at-predicted_1")
    assert tab.run(seen) == [False, True]
    tab.wait("document.querySelector('#predicted_1').dataset.drawn === 'yes'", seconds=10)


def test_tables_are_sorted_and_commands_copied(tab):
    names = ".sortable td:first-child"
    tab.click(".sortable th:nth-child(2) button")
    assert texts(tab, names) == ["c", "b", "a"]  # numbers as numbers, blanks last
    tab.click(".sortable th:nth-child(1) button")
    assert texts(tab, names) == ["a", "b", "c"]
    tab.run("document.addEventListener('copy', () => { window.copied = String(getSelection()) })")
    tab.click(".copy")
    assert texts(tab, ".copy") == ["Copied"] and tab.run("window.copied") == COMMAND
