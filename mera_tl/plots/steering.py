"""What one steering does: over the threshold, by example, by layer, token by token."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mera_tl.plots.style import (
    BLUE,
    CHANGES,
    GREEN,
    GREY,
    VERMILLION,
    colour_of,
    finish,
    knob_axis,
    mark,
    rows_where,
)

_RECOVERED, _REGRESSED = CHANGES["0->1"][1], CHANGES["1->0"][1]


def steering_curve(df: pd.DataFrame) -> go.Figure:
    """Draw gain and its lower bound over the threshold, the certified region and the choice.

    Takes the evidence of one certificate, one row per threshold: `threshold`, `gain`, `lower`,
    `chosen` and, the same in every row, `method`, `knob` (what the grid varies: threshold or
    strength), `n`, `min_gain`, `confidence` and `base`, the unsteered accuracy (NaN where unknown:
    the axis is then the gain); `task`, if there, is named.
    """
    df = df.sort_values("threshold")
    terms = df.iloc[0]
    known = not pd.isna(terms["base"])
    start, unit, digits = (terms["base"], 1, ".3f") if known else (0.0, 100, ".1f")
    certified = df["lower"] >= terms["min_gain"]
    x, axis = knob_axis(df["threshold"], terms["knob"])
    asked = unit * (start + terms["min_gain"])
    figure = go.Figure()
    _shade(figure, x, certified.to_numpy())
    figure.add_scatter(
        x=[x[0], x[-1]],
        y=[asked, asked],
        mode="lines",
        name="unsteered" if not terms["min_gain"] else "gain asked for",
        line={"color": GREY, "dash": "dash"},
        hoverinfo="skip",
    )
    for column, name, dash in (("gain", "observed", "solid"), ("lower", "lower bound", "dot")):
        figure.add_scatter(
            x=x,
            # A bound of the gain may reach below what any accuracy can be.
            y=unit * (start + df[column]).clip(lower=0 if known else None),
            mode="lines+markers",
            name=name,
            line={"color": colour_of(terms["method"]), "dash": dash},
            customdata=df["threshold"],
            hovertemplate=f"%{{customdata:.3g}}: %{{y:{digits}}}<extra>{name}</extra>",
        )
    chosen = df["chosen"].to_numpy(bool)
    if chosen.any():
        figure.add_scatter(
            x=x[chosen],
            y=unit * (start + df["gain"][chosen]),
            mode="markers",
            name=f"chosen: {df['threshold'][chosen].max():.3g}",
            marker={"symbol": "star", "size": 17, "color": GREEN},
        )
    figure.update_xaxes(axis)
    figure.update_yaxes(title="accuracy" if known else "gain (points)")
    title = "Where steering helps" if certified.any() else "Nowhere certain to help: abstain"
    return finish(figure, title, _terms(df))


def _terms(df: pd.DataFrame) -> str:
    """Say in one line what the evidence of a certificate is."""
    terms, certified = df.iloc[0], sum(df["lower"] >= df["min_gain"])
    place = f"{terms['task']}: " if "task" in df else ""
    return (
        f"{place}{terms['method']}, {terms['n']:,} calibration examples; {certified} of {len(df)} "
        f"{terms['knob']}s certified, confidence {terms['confidence']:.4g}"
    )


def _shade(figure: go.Figure, x: np.ndarray, certified: np.ndarray) -> None:
    """Shade the runs of certified thresholds, half a step to each side."""
    half = (x[-1] - x[0]) / max(1, len(x) - 1) / 2 or 0.5
    changes = np.diff(np.concatenate([[0], certified.astype(int), [0]]))
    for first, stop in zip(np.flatnonzero(changes > 0), np.flatnonzero(changes < 0), strict=True):
        figure.add_vrect(
            x0=x[first] - half,
            x1=x[stop - 1] + half,
            fillcolor="rgba(0,158,115,.14)",
            line={"color": GREEN, "width": 1, "dash": "dot"},
            layer="below",
            name="certified",
            showlegend=bool(first == certified.argmax()),
        )


def calibration_evidence(df: pd.DataFrame) -> go.Figure:
    """Draw recoveries and regressions per threshold above the lower bound of the mean gain.

    Takes the same rows as `steering_curve`, with `recoveries` and `regressions`.
    """
    df = df.sort_values("threshold")
    names = [f"{t:.3g}" for t in df["threshold"]]
    figure = make_subplots(rows=2, shared_xaxes=True, row_heights=[0.62, 0.38])
    for column, sign, colour in (("recoveries", 1, _RECOVERED), ("regressions", -1, _REGRESSED)):
        figure.add_bar(
            x=names,
            y=sign * df[column],
            name=column,
            marker_color=colour,
            customdata=df[column],
            hovertemplate="%{customdata} " + column + "<extra></extra>",
        )
    certified = df["lower"] >= df["min_gain"]
    figure.add_bar(
        x=names,
        y=100 * df["lower"],
        marker_color=[GREEN if sure else GREY for sure in certified],
        hovertemplate="gain at least %{y:.1f} points<extra></extra>",
        row=2,
        col=1,
        showlegend=False,
    )
    figure.update_xaxes(type="category")
    _, axis = knob_axis(df["threshold"], df["knob"].iloc[0])
    figure.update_xaxes(title=axis["title"], row=2, col=1)
    figure.update_yaxes(title="examples", row=1, col=1)
    figure.update_yaxes(title="bound (points)", row=2, col=1)
    title = "What the certificate rests on"
    return finish(figure, title, _terms(df), barmode="relative", height=500)


def error_before_after(df: pd.DataFrame, *, method: str) -> go.Figure:
    """Draw each example's error after steering against its error before.

    Takes columns `before`, `after` (in [0, 1]), `change` (a key of `style.CHANGES`) and `row`, if
    points are to say which example they are.
    """
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": GREY, "dash": "dash"}, name="unchanged"
    )
    for change, (name, _) in CHANGES.items():
        rows = rows_where(df, change=change)
        figure.add_scatter(
            x=rows["before"],
            y=rows["after"],
            mode="markers",
            name=f"{name} ({len(rows):,})",
            marker=mark(change) | {"size": 6},
            customdata=rows.get("row"),
            hovertemplate="row %{customdata}: %{x:.2f}, then %{y:.2f}<extra>" + name + "</extra>",
        )
    figure.update_xaxes(title="error before, 1 - P(true option)", range=[-0.02, 1.02])
    figure.update_yaxes(title="error after", range=[-0.02, 1.02])
    caption = f"{method}, {len(df):,} test examples; below the line is better"
    return finish(figure, "Error before and after", caption, height=500)


def steered_share(df: pd.DataFrame, *, method: str, n: int) -> go.Figure:
    """Draw the share of tokens that were moved, by layer and token position.

    Takes columns `layer`, `position` (0 is the final prompt token, negative before it, positive for
    generated tokens), `further` (whether tokens before that one are counted there), `n` (tokens
    seen there), `share` and `shift` (in residual norms).
    """
    # Where a scope begins late there is nothing to see before it.
    moved = [*df["position"][df["share"] > 0], 0]
    df = pd.DataFrame(df[df["position"] >= min(moved) - 1])
    positions, layers = sorted(set(df["position"])), sorted(set(df["layer"]))
    cells: Any = df.pivot(index="layer", columns="position", values=["share", "shift", "n"])
    names = ["final" if p == 0 else f"{p:+d}" for p in positions]
    if df["further"].to_numpy().any():
        names[0] = f"≤ {positions[0]}"
    figure = go.Figure(
        go.Heatmap(
            z=100 * cells["share"].to_numpy(),
            x=names,
            y=[str(layer) for layer in layers],
            customdata=np.stack([cells["shift"].to_numpy(), cells["n"].to_numpy()], axis=-1),
            texttemplate="%{z:.0f} %" if len(positions) <= 12 else None,
            hovertemplate="layer %{y}, token %{x}: %{z:.1f} % of %{customdata[1]:,} moved,<br>by "
            "%{customdata[0]:.3f} residual norms on average<extra></extra>",
            colorscale=((0, "rgba(0,158,115,.06)"), (1, GREEN)),
            zmin=0,
            zmax=100,
            xgap=1,
            ygap=1,
            colorbar={"title": "moved", "ticksuffix": " %", "thickness": 14},
        )
    )
    figure.update_xaxes(title="token, counted from the final prompt token", type="category")
    figure.update_yaxes(title="layer", type="category")
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False)
    caption = f"{method}, steered layers, {n:,} test examples; + are generated tokens"
    height, meta = 230 + 26 * len(layers), {"min_width": 160 + 22 * len(positions)}
    title = "Which tokens are moved, layer by layer"
    return finish(figure, title, caption, height=height, meta=meta)


def option_bars(
    options: Sequence[str], before: Sequence[float], after: Sequence[float]
) -> go.Figure:
    """Draw the probability of every option of one prompt, unsteered and steered."""
    figure = go.Figure()
    for probs, name, colour in ((after, "steered", BLUE), (before, "unsteered", GREY)):
        figure.add_bar(
            x=[100 * p for p in probs],
            y=list(options),
            name=name,
            orientation="h",
            marker_color=colour,
            text=[f"{100 * p:.0f} %" for p in probs],
            textposition="outside",  # on a bar no colour of text can be read on light and dark
            cliponaxis=False,
            hovertemplate="%{y}, " + name + ": %{x:.1f} %<extra></extra>",
        )
    figure.update_xaxes(title="P(option)", range=[0, 112], dtick=25, ticksuffix=" %")
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    figure.update_layout(legend_traceorder="reversed")
    return finish(figure, "What the model answers", height=190 + 48 * len(options))


def error_by_layer(df: pd.DataFrame) -> go.Figure:
    """Draw the error that each layer's probe predicts of one prompt, before and after.

    Takes the rows of `ledger`, and draws the last token at which the probe may be asked.
    """
    valid = pd.DataFrame(df[df["valid"]])
    rows = pd.DataFrame(valid[valid["pos"] == valid["pos"].max()]).sort_values("layer")
    figure = go.Figure()
    for column, name, colour in (("before", "unsteered", GREY), ("after", "steered", BLUE)):
        figure.add_scatter(
            x=rows["layer"],
            y=rows[column],
            name=name,
            mode="lines+markers",
            line_color=colour,
            hovertemplate="layer %{x}: %{y:.3f}<extra>" + name + "</extra>",
        )
    moved = pd.DataFrame(rows[rows["shift"] > 0])
    figure.add_scatter(
        x=moved["layer"],
        y=moved["after"],
        name="moved here",
        mode="markers",
        marker={"symbol": "circle-open", "size": 16, "color": GREEN, "line": {"width": 3}},
        hoverinfo="skip",
    )
    figure.update_xaxes(title="layer", dtick=1 if len(rows) <= 16 else None)
    figure.update_yaxes(title="predicted error", range=[-0.03, 1.03])
    caption = f"at the token {rows['token'].iloc[0]!r}, where the probe was fitted"
    return finish(figure, "What the probe predicts", caption, height=360)


_RISK = ((0, "rgba(213,94,0,.05)"), (1, VERMILLION))
"""Of predicted error. No shade of it is the grey of what is not predicted."""
CONTEXT = 8
"""Tokens that are drawn before the first that is read or moved."""


def ledger(df: pd.DataFrame, *, title: str, caption: str = "") -> go.Figure:
    """Draw one prompt, tokens by layers: predicted error before and after, and the shifts.

    Takes columns `pos`, `token`, `layer`, `before`, `after` (predicted error), `shift` (length of
    the shift relative to the residual) and `valid`: at other tokens, which the probe was not fitted
    to, there is grey in the place of a prediction. Of the tokens before the first that is read or
    moved only a few are drawn.
    """
    counts = df.loc[df["valid"].astype(bool) | (df["shift"] > 0), "pos"]
    start = 0 if counts.empty else max(0, int(counts.min()) - CONTEXT)
    df = pd.DataFrame(df[df["pos"] >= start])
    if start:
        note = f"shown from token {start} on"
        caption = f"{caption}; {note}" if caption else note
    tokens = df.drop_duplicates("pos").sort_values("pos")
    titles = ("predicted error before", "predicted error after", "shift / residual norm")
    height = 260 + 3 * max(80, 18 * df["layer"].nunique())
    figure = make_subplots(
        rows=3, shared_xaxes=True, vertical_spacing=45 / height, subplot_titles=titles
    )
    bars: dict[str, Any] = {"len": 0.6, "y": 0.7, "title": "error", "thickness": 14}
    # Without a shift anywhere plotly would centre the scale on zero, and draw zero in full colour.
    most = max(float(df["shift"].to_numpy(dtype=float).max()), 1e-3)
    for row, column in enumerate(("before", "after", "shift"), start=1):
        error = column != "shift"
        drawn = df.assign(shown=df[column].where(df["valid"].astype(bool) | (not error)))
        grid = drawn.pivot(index="layer", columns="pos", values="shown")
        figure.add_heatmap(
            z=grid.to_numpy(),
            x=list(grid.columns),
            y=[str(layer) for layer in grid.index],
            text=[list(tokens["token"])] * len(grid),
            hovertemplate=f"%{{text}}, layer %{{y}}<br>{column}: %{{z:.3f}}<extra></extra>",
            colorscale=_RISK if error else ((0, "rgba(0,158,115,.06)"), (1, GREEN)),
            zmin=0,
            zmax=1 if error else most,
            showscale=row != 2,
            colorbar=bars if error else bars | {"len": 0.3, "y": 0.14, "title": "shift"},
            row=row,
            col=1,
        )
    grey = tokens.loc[~tokens["valid"].astype(bool), "pos"].tolist()
    _grey_out(figure, grey)
    if grey:
        note = "grey: the probe was not fitted there"
        caption = f"{caption}; {note}" if caption else note
    figure.update_xaxes(tickvals=list(tokens["pos"]), showgrid=False, zeroline=False)
    figure.update_xaxes(ticktext=list(tokens["token"]), tickangle=-60, row=3, col=1)
    figure.update_yaxes(title="layer", type="category", showgrid=False)
    meta = {"min_width": 170 + 19 * len(tokens)}
    return finish(figure, title, caption, height=height, meta=meta)


def _grey_out(figure: go.Figure, grey: Sequence[int]) -> None:
    """Cover predictions at some tokens."""
    # Neighbours share a rectangle: plotly takes 30 ms for each.
    firsts = [pos for pos in grey if pos - 1 not in grey]
    lasts = [pos for pos in grey if pos + 1 not in grey]
    for (first, last), row in product(zip(firsts, lasts, strict=True), (1, 2)):
        panel: dict[str, Any] = {"row": row, "col": 1}
        colour = "rgba(128,128,128,.45)"
        figure.add_vrect(x0=first - 0.5, x1=last + 0.5, fillcolor=colour, line_width=0, **panel)
