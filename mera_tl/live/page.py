"""The panel as a page on this machine: dash, plotly's own (extra `explore`).

Callbacks are functions of what a tab shows and keep nothing, so several tabs never mix. The server
listens on 127.0.0.1 only, answers requests that name this host, and asks for a token that is in the
address it prints, so that no other user or web page can read along.
"""

import hmac
import logging
import secrets
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from typing import Any

import plotly.graph_objects as go

from mera_tl.live.bench import THRESHOLDS, Bench, Choices
from mera_tl.live.effects import panel, replies

POSITIONS = {
    "last": "from the final prompt token on",
    "final": "the final prompt token",
    "all": "every token",
    "generated": "generated tokens",
}
LOCAL = ("127.0.0.1", "localhost")
COOKIE = "mera-token"
_CSS = """
#page { display: grid; grid-template-columns: 20rem minmax(0, 1fr); gap: 1.5rem; }
body { max-width: 90rem; }
#controls > label, #controls > .label { display: block; font-weight: 600; margin: .9rem 0 .2rem; }
textarea, #options { width: 100%; font: inherit; color: inherit; background: var(--box);
  border: 1px solid var(--line); border-radius: 4px; padding: .4rem; }
textarea { min-height: 8rem; resize: vertical; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; } .pair pre { min-height: 3rem; }
.figures { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
#said { font-size: 1.15rem; font-weight: 600; margin: .3rem 0; }
#wrong { color: var(--stop); } .choice label { display: flex; gap: .4rem; }
button.again { margin: .4rem .4rem 0 0; }
.tokens { overflow-x: auto; } [hidden] { display: none !important; }
.dash-slider-mark { color: var(--soft) !important; }
@media (max-width: 760px) { #page, .figures { grid-template-columns: minmax(0, 1fr); } }
:root { --Dash-Fill-Inverse-Strong: var(--page); --Dash-Text-Primary: var(--ink);
  --Dash-Text-Strong: var(--ink); --Dash-Text-Weak: var(--soft); --Dash-Stroke-Strong: var(--line);
  --Dash-Stroke-Weak: var(--line); --Dash-Fill-Interactive-Strong: var(--good);
  --Dash-Fill-Interactive-Weak: var(--mark); --Dash-Fill-Weak: var(--box);
  --Dash-Fill-Primary-Hover: var(--mark); --Dash-Fill-Primary-Active: var(--mark); }
.js-plotly-plot text[class$=title], .js-plotly-plot .legendtext,
.js-plotly-plot g[class$=tick] text, .js-plotly-plot .annotation-text, .js-plotly-plot .cbaxis text,
.js-plotly-plot .gtitle,
.js-plotly-plot .bartext { fill: var(--ink) !important; }
"""
_PAGE = """<!doctype html>
<html lang="en"><head>{%metas%}<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{%title%}</title>{%css%}<style>STYLE</style></head>
<body>{%app_entry%}<footer>{%config%}{%scripts%}{%renderer%}</footer></body></html>"""


def require_dash() -> Any:
    """Return dash.

    Raises:
        ValueError: if it is not installed, saying how to install it.
    """
    try:
        import dash
    except ImportError:
        raise ValueError("The page needs dash; run `pip install 'mera-tl[explore]'`.") from None
    return dash


def make_app(bench: Bench, *, token: str) -> Any:
    """Return the dash app; requests without the token are refused."""
    dash = require_dash()
    app = dash.Dash(__name__, title=f"{bench.model.name}, live", update_title=None)
    style = (files("mera_tl.report") / "templates" / "style.css").read_text("utf-8")
    app.index_string = _PAGE.replace("STYLE", style + _CSS)
    app.layout = lambda: _layout(bench)  # anew for every tab
    _guard(app.server, token)
    _connect(app, bench)
    return app


def serve(bench: Bench, *, port: int = 0, ready: Callable[[str], None] | None = None) -> None:
    """Serve the page until interrupted; `ready` gets its address, with the token.

    Raises:
        ValueError: if dash is not installed, or the port is taken or none.
    """
    if not 0 <= port < 2**16:  # a greater one would be taken modulo 65,536
        raise ValueError(f"{port} is no port; pass one up to 65535, or 0 for a free one.")
    # A line per request would bury the address, and the first one holds the token.
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    token = secrets.token_urlsafe(16)
    app = make_app(bench, token=token)
    from werkzeug.serving import make_server

    try:
        server = make_server("127.0.0.1", port, app.server, threaded=True)
    except (OSError, SystemExit):
        raise ValueError(f"Port {port} is taken; pass another, or 0 for a free one.") from None
    if ready is not None:
        ready(f"http://127.0.0.1:{server.port}/?token={token}")
    server.serve_forever()


def _guard(server: Any, token: str) -> None:
    """Refuse other hosts and callers without the token; keep it in a cookie once it was given."""
    import flask

    @server.before_request
    def check() -> Any:
        request = flask.request
        if request.host.rpartition(":")[0] not in LOCAL:  # a web page that renamed itself to us
            return flask.Response("This page is served to this machine only.", 403)
        given = request.args.get("token", request.cookies.get(COOKIE, ""))
        if not hmac.compare_digest(given.encode(), token.encode()):
            return flask.Response("Open the address that `mera explore` printed.", 403)
        return None

    @server.after_request
    def keep(response: Any) -> Any:
        if "token" in flask.request.args and response.status_code == 200:
            response.set_cookie(COOKIE, token, httponly=True, samesite="Strict")
        return response


# --- what is on the page ------------------------------------------------------------------------


def _layout(bench: Bench) -> Any:
    from dash import html

    head = html.H1(f"{bench.model.name}, steered live")
    sides = [html.Div(_controls(bench), id="controls"), html.Div(_shown(bench), id="shown")]
    note = (
        "Predictions are shown only at tokens to which the probe was fitted. A certificate "
        "covers the direction that says so, at its own threshold and layers, and nothing else."
    )
    return html.Div([head, html.P(note, className="soft"), html.Div(sides, id="page")])


def _controls(bench: Bench) -> list[Any]:
    from dash import dcc, html

    start, n_layers = bench.start, bench.model.n_layers
    step, marked = THRESHOLDS.index(start.threshold), (0.001, 0.02, 0.2, 0.5, 0.8, 0.99)
    marks = {i: f"{t:g}" for i, t in enumerate(THRESHOLDS) if t in marked}
    rules = {"threshold": "as far as the threshold asks", "strength": "by a fixed length"}
    prompt = bench.prompts[0] if bench.prompts else ""
    # An input box would show a slider's step, not the threshold.
    slider = partial(dcc.Slider, allow_direct_input=False)
    controls: list[Any] = [
        html.Label("Prompt", htmlFor="prompt"),
        dcc.Textarea(id="prompt", value=prompt),
        html.Button("Run", id="read", className="again"),
        html.Button("Another example", id="next", className="again", disabled=not bench.prompts),
        html.Label("Options, with commas between", htmlFor="options", hidden=bench.scored),
        html.Div(
            dcc.Input(id="options", value=", ".join(bench.options), debounce=True),
            hidden=bench.scored,
        ),
        html.Div("Direction", className="label"),
        dcc.Dropdown([*bench.ways], start.way or None, id="way", placeholder="none"),
        html.Div("Layers", className="label"),
        dcc.Dropdown([*range(n_layers)], [*start.layers], id="layers", multi=True),
        html.Div("Move", className="label"),
        dcc.RadioItems(rules, "threshold", id="rule", className="choice"),
        html.Div(["Threshold ", html.Span(id="at")], className="label"),
        slider(0, len(THRESHOLDS) - 1, 1, value=step, marks=marks, id="threshold"),
        html.Div("Strength, in residual norms", className="label"),
        slider(0, 2, 0.05, value=0.1, marks={0: "0", 1: "1", 2: "2"}, id="strength"),
        html.Div("Tokens", className="label"),
        dcc.RadioItems(POSITIONS, start.positions, id="positions", className="choice"),
        html.Div("Tokens of a reply", className="label", hidden=bench.scored),
        html.Div(
            slider(4, 64, 4, value=16, marks={4: "4", 32: "32", 64: "64"}, id="n"),
            hidden=bench.scored,
        ),
    ]
    return controls


def _shown(bench: Bench) -> list[Any]:
    from dash import dcc, html

    live: dict[str, Any] = {"aria-live": "polite"}
    graph: dict[str, Any] = {"config": {"displayModeBar": False, "responsive": True}}
    return [
        html.P(id="said", **live),
        html.P(id="wrong", role="alert"),
        html.Div(
            [
                html.Div(dcc.Graph(id="bars", **graph), hidden=bench.scored),
                html.Div(dcc.Graph(id="by-layer", **graph)),
            ],
            className="figures",
        ),
        html.Div(
            [
                html.Div([html.H3("Reply, unsteered"), html.Pre(id="before")]),
                html.Div([html.H3("Reply, steered"), html.Pre(id="after")]),
            ],
            className="pair",
        ),
        html.Div(dcc.Graph(id="tokens", **graph), className="tokens"),
    ]


# --- what happens on it -------------------------------------------------------------------------


def _connect(app: Any, bench: Bench) -> None:
    from dash import Input, Output, State

    names = ("way", "rule", "threshold", "strength", "layers", "positions", "n")
    chosen = [Input(name, "value") for name in names]
    asked = [Input("read", "n_clicks"), State("prompt", "value")]
    figures = [Output(name, "figure") for name in ("bars", "by-layer", "tokens")]

    @app.callback(
        Output("said", "children"),
        Output("wrong", "children"),
        *figures,
        Output("tokens", "style"),
        *asked,
        Input("options", "value"),
        *chosen,
    )
    def answer(_: Any, prompt: str, options: str, *values: Any) -> Any:
        try:
            named = tuple(o.strip() for o in (options or "").split(",") if o.strip())
            told = panel(bench, prompt or "", choices_of(*values), options=named)
        except ValueError as error:
            return "", str(error), *(_plain(None) for _ in figures), {}
        drawn: list[Any] = [_plain(each) for each in (told.bars, told.layers, told.tokens)]
        # As wide as its tokens: on a phone few of them need no scrolling.
        layout: Any = drawn[-1].layout
        width = (layout.meta or {}).get("min_width", 0)
        return told.said, "", *drawn, {"minWidth": f"{width}px"}

    @app.callback(Output("before", "children"), Output("after", "children"), *asked, *chosen)
    def reply(_: Any, prompt: str, *values: Any) -> Any:
        try:
            return replies(bench, prompt or "", choices_of(*values))
        except ValueError as error:
            return "", str(error)

    @app.callback(
        Output("prompt", "value"),
        Output("read", "n_clicks"),
        Input("next", "n_clicks"),
        State("read", "n_clicks"),
        prevent_initial_call=True,
    )
    def another(n: int, clicks: int | None) -> Any:
        return bench.prompts[n % len(bench.prompts)], (clicks or 0) + 1

    @app.callback(
        Output("threshold", "disabled"), Output("strength", "disabled"), Input("rule", "value")
    )
    def idle(rule: str) -> tuple[bool, bool]:
        return rule != "threshold", rule != "strength"

    @app.callback(Output("at", "children"), Input("threshold", "value"))
    def at(step: int) -> str:
        return f"{THRESHOLDS[step]:g}"


def choices_of(
    way: Any, rule: Any, threshold: int, strength: float, layers: Any, positions: Any, n: int
) -> Choices:
    """Return what a tab shows as choices; of the threshold it has the slider's step."""
    return Choices(
        way or "", rule, THRESHOLDS[threshold], strength, tuple(sorted(layers or ())), positions, n
    )


def _plain(figure: go.Figure | None) -> go.Figure:
    """Return a figure on the page's own ground; an empty one for none."""
    figure = figure or go.Figure(layout={"xaxis": {"visible": False}, "yaxis": {"visible": False}})
    return figure.update_layout(paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)")
