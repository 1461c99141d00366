"""A page in a real browser: every figure drawn, nothing complained, hover and legend alive.

Skipped where no Chromium is installed.
"""

import re
import shutil
import subprocess

import pytest
from test_plots import FIGURES, evidence

from mera_tl import plots
from mera_tl.report import html, render

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")

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


CLICKS = """
<script>
window.addEventListener("load", () => setTimeout(() => {
  const say = (name, value) => document.documentElement.setAttribute("data-" + name, value);
  const box = document.querySelector(".explorer"), detail = () => box.querySelector(".detail");
  const rows = () => [...box.querySelectorAll("tbody tr")];
  const first = () => rows()[0].firstChild.textContent;
  say("first", first());
  rows().at(-1).click();
  say("chosen", rows().at(-1).getAttribute("aria-selected"));
  say("prompt", detail().querySelector("pre").textContent);
  say("bars", detail().querySelectorAll(".bar").length);
  box.querySelector("th button").click();
  say("sorted", first());
  const kind = box.querySelector(".kind");
  kind.value = "regressed";
  kind.dispatchEvent(new Event("change"));
  say("regressed", rows().length);
  const slider = document.querySelector(".slider input");
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  say("says", document.querySelector(".slider .says").textContent);
}, 1500));
</script>
"""


def test_examples_are_chosen_sorted_and_filtered_and_the_threshold_moves(tmp_path):
    changes = ["0->1", "0->1", "1->0"]
    rows = [
        {"row": i, "label": "a", "change": change, "before": "b", "after": "a", "reply": None}
        | {"error_before": 0.9, "error_after": 0.1, "prompt": f"prompt {i}"}
        | {"p_before": [0.1, 0.9], "p_after": [0.9, 0.1]}
        for i, change in enumerate(changes)
    ]
    slider = {"labels": ["0.1", "0.5"], "says": ["3 recovered", "1 recovered"], "marks": [{}, {}]}
    body = html.environment().from_string(
        "{% extends 'page.html' %}{% block body %}{{ parts.slider(slider, 'threshold') }}"
        "{{ parts.explorer(value, 'explorer') }}{% endblock %}"
    )
    shared = {"title": "Examples", "specs": {}, "plotly": "", "blocks": []}
    text = body.render(
        shared
        | {"slider": slider | {"chosen": 1, "note": ""}}
        | {"value": {"options": ["a", "b"], "rows": rows}}
    )
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", CLICKS + "</body>"), encoding="utf-8")
    text = dump(page)
    assert root(text, "problems") is None
    seen = [root(text, name) for name in ("first", "chosen", "prompt", "bars", "sorted")]
    assert seen == ["0", "true", "prompt 2", "4", "2"]
    assert root(text, "regressed") == "1" and root(text, "says") == "3 recovered"
