"""One HTML page that opens anywhere: text, tables and figures, plotly.js embedded once.

Figures are data in the page; a script draws them, so a hundred cost little more than one. Titles
and captions leave the figure and become text of the page, which wraps on a narrow screen. Light or
dark follows the reader's system.
"""

import html
import json
from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5b6570; --page: #fff; --box: #f4f6f8;
  --line: #d8dde2; --link: #0067a3; --good: #00795a; --stop: #a84a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaed; --soft: #a3acb5; --page: #14171a;
  --box: #1e2328; --line: #353c43; --link: #6bb7ea; --good: #35c79c; --stop: #f0914c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 4rem; max-width: 62rem;
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  color: var(--ink); background: var(--page); overflow-wrap: break-word; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.35rem; margin: 2.8rem 0 .6rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .2rem; }
p { max-width: 46rem; } a { color: var(--link); }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
figure { margin: 1.2rem 0 2rem; } figcaption { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; } th { color: var(--soft); font-weight: 600; }
th.text, td.text { text-align: left; }
.card { background: var(--box); border-left: 4px solid var(--line); border-radius: 4px;
  padding: .7rem 1rem; margin: .8rem 0; } .card p { margin: .3rem 0; }
.card pre { padding: 0; margin: .4rem 0; max-height: 16rem; }
.card.steer { border-color: var(--good); } .card.abstain { border-color: var(--stop); }
pre { background: var(--box); padding: .7rem 1rem; border-radius: 4px; overflow-x: auto;
  font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
summary { cursor: pointer; font-weight: 600; padding: .4rem 0; }
.plot text[class$=title], .plot .legendtext, .plot g[class$=tick] text, .plot .annotation-text,
.plot .cbaxis text { fill: var(--ink) !important; }
@media print { details > * { display: block; } body { max-width: none; } }
"""

_SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const root = document.documentElement;
const problem = text => { root.dataset.problems = (root.dataset.problems || "") + text + "; "; };
window.addEventListener("error", event => problem(event.message));
window.addEventListener("unhandledrejection", event => problem(String(event.reason)));
for (const place of document.querySelectorAll(".plot")) {
  const { data, layout } = figures[place.id];
  const config = { responsive: true, displaylogo: false,
    displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };
  Plotly.newPlot(place, data, layout, config).then(() => { place.dataset.drawn = "yes"; })
    .catch(error => { problem(error.message); place.textContent = "Not drawn: " + error; });
}
for (const fold of document.querySelectorAll("details"))
  fold.addEventListener("toggle", () =>
    fold.querySelectorAll(".plot").forEach(place => Plotly.Plots.resize(place)));
"""


def write_page(title: str, body: str, figures: Mapping[str, go.Figure]) -> str:
    """Return a whole page; `body` places each figure with `figure_block`."""
    from plotly.offline import get_plotlyjs

    specs = {name: _bare(figure) for name, figure in figures.items()}
    data = json.dumps(specs, separators=(",", ":")).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n"
        f'<script type="application/json" id="figures">{data}</script>\n'
        f"<script>{get_plotlyjs()}</script>\n<script>{_SCRIPT}</script>\n</body></html>\n"
    )


def figure_block(name: str, figure: go.Figure, *, links: str = "") -> str:
    """Return the place of a figure in a page: its title, the line below it, the figure."""
    layout = _bare(figure)["layout"]
    heading = figure.to_dict()["layout"].get("title", {})
    narrowest = layout.get("meta", {}).get("min_width", 0)
    size = f"height:{layout['height']}px;min-width:{narrowest}px"
    return (
        f"<figure><h3>{html.escape(heading.get('text', ''))}</h3>"
        f"<figcaption>{html.escape(heading.get('subtitle', {}).get('text', ''))}"
        f'{links}</figcaption><div class="scroll"><div class="plot" id="{name}" '
        f'style="{size}"></div></div></figure>\n'
    )


def _bare(figure: go.Figure) -> dict[str, Any]:
    """Return a figure's JSON without what the page says in its stead."""
    spec = json.loads(str(figure.to_json()))
    layout = spec["layout"]
    top = 36 if layout.get("annotations") else 12
    margin = {"l": 50, "r": 16, "t": top, "b": 50}
    layout |= {"title": {"text": ""}, "autosize": True, "margin": margin}
    layout["height"] = layout.get("height", 440) - 70
    return spec


def prompt_html(prompt: str) -> str:
    """Return a prompt as it is, white space and all."""
    return f"<pre>{html.escape(prompt)}</pre>\n"


def table_html(frame: pd.DataFrame) -> str:
    """Return a data frame as a table that scrolls by itself; numbers to three digits."""
    texts = {c for c in frame if not pd.api.types.is_numeric_dtype(frame[c])}

    def cell(tag: str, column: object, value: object) -> str:
        if isinstance(value, float):
            value = "" if pd.isna(value) else f"{value:.3f}"
        kind = ' class="text"' if column in texts else ""
        return f"<{tag}{kind}>{html.escape('' if value is None else str(value))}</{tag}>"

    head = "".join(cell("th", column, column) for column in frame)
    rows = "".join(
        "<tr>" + "".join(cell("td", c, v) for c, v in zip(frame, row, strict=True)) + "</tr>\n"
        for row in frame.itertuples(index=False)
    )
    return f'<div class="scroll"><table><tr>{head}</tr>\n{rows}</table></div>\n'
