"""What a search on training data tried: every candidate by what it recovers and what it breaks."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import hex_to_rgb

from mera_tl.plots.style import BLUE, GREEN, GREY, ORANGE, PINK, SKY, VERMILLION, finish

_COLOURS = {
    "euclidean": GREY,
    "pattern": SKY,
    "contrastive": ORANGE,
    "controlled_pattern": BLUE,
    "controlled_contrastive": GREEN,
    "answer_controlled": VERMILLION,
    "flip": PINK,
}


def search_table(df: pd.DataFrame) -> go.Figure:
    """Draw each candidate's recoveries against its regressions, in shares of what it has seen.

    Takes `Search.table`. A star is the most valuable one; pale marks left the race early; crosses
    read one probe per answer. Points above the dashed line gain.
    """
    figure = go.Figure()
    n, value, lost, won = (
        df[name].to_numpy(dtype=float) for name in ("n", "value", "regressions", "recoveries")
    )
    complete, x, y = n == n.max(), 100 * lost / n, 100 * won / n
    text = np.array([_words(row) for row in df.to_dict("records")])
    symbols = np.array(["circle" if _is_number(p) else "x" for p in df["penalty"]])
    top = float(max(x.max(), y.max(), 1))
    diagonal = {"x": [0, top], "y": [0, top], "showlegend": False, "hoverinfo": "skip"}
    figure.add_scatter(**diagonal, mode="lines", line={"color": GREY, "dash": "dash", "width": 1})
    for direction in dict.fromkeys(df["direction"]):
        mine = np.flatnonzero((df["direction"] == direction).to_numpy())
        mine = mine[np.argsort(~complete[mine], kind="stable")]  # a legend shows the first mark
        colour = _COLOURS.get(direction, GREY)
        figure.add_scatter(
            x=x[mine],
            y=y[mine],
            name=direction,
            mode="markers",
            marker={
                "color": [_faded(colour, seen=bool(complete[i])) for i in mine],
                "symbol": symbols[mine],
                "line": {"color": colour, "width": 1},  # so that pale ones show on black
            },
            text=text[mine],
            hovertemplate="%{text}<br>%{y:.1f} % recovered, %{x:.1f} % broken<extra></extra>",
        )
    best = int(np.where(complete, value, -np.inf).argmax())
    star: dict[str, Any] = {"symbol": "star", "size": 17, "color": "rgba(0,0,0,0)"}
    star["line"] = {"width": 2, "color": VERMILLION}
    figure.add_scatter(
        x=[x[best]],
        y=[y[best]],
        name="most valuable",
        mode="markers",
        marker=star,
        hoverinfo="skip",
    )
    figure.update_traces(cliponaxis=False)  # many lie on an axis
    figure.update_xaxes(title="regressions (%)", rangemode="tozero")
    figure.update_yaxes(title="recoveries (%)", rangemode="tozero")
    caption = (
        f"{len(df)} candidates, on up to {n.max():.0f} training examples held out from fitting; "
        "pale: dropped after fewer"
    )
    return finish(figure, "What the search tried", caption)


def foresight(df: pd.DataFrame) -> go.Figure:
    """Draw the gain that was foreseen to first order beside the real one, candidate by candidate.

    Takes `Search.table` with its column `foreseen`. Both are means over training examples, those
    that were foreseen over the first quarter; larger marks have seen more. On the dashed line what
    was foreseen came true.
    """
    df = df.dropna(subset=["foreseen"])
    x, y = (pd.Series(100 * df[name].to_numpy(dtype=float)) for name in ("foreseen", "gain"))
    rank, n = x.rank().corr(y.rank()), df["n"].to_numpy()
    ends = np.array([x, y], dtype=float)
    low, high = float(ends.min()), float(ends.max())
    figure = go.Figure()
    figure.add_scatter(
        x=[low, high],
        y=[low, high],
        mode="lines",
        line={"color": GREY, "dash": "dash", "width": 1},
        showlegend=False,
        hoverinfo="skip",
    )
    text = np.array([_words(row) for row in df.to_dict("records")])
    for direction in dict.fromkeys(df["direction"]):
        mine = (df["direction"] == direction).to_numpy()
        size = 5 + 6 * (n[mine] / n.max()) ** 0.5
        figure.add_scatter(
            x=x[mine],
            y=y[mine],
            name=direction,
            mode="markers",
            # Marks of several sizes would get a white rim, which glares on a dark page.
            marker={
                "color": _COLOURS.get(direction, GREY),
                "size": size,
                "opacity": 0.6,
                "line": {"width": 0},
            },
            text=text[mine],
            hovertemplate="%{text}<br>foreseen %{x:+.1f}, real %{y:+.1f} points<extra></extra>",
        )
    figure.update_xaxes(title="gain forecast (points of accuracy)")
    figure.update_yaxes(title="real gain in training (points)")
    caption = f"{len(df)} candidates, one backward pass per example; rank correlation {rank:.2f}"
    return finish(figure, "Gain forecast to first order, and real gain", caption)


def _faded(colour: str, *, seen: bool) -> str:
    """Return a colour, pale where a candidate left the race early."""
    red, green, blue = hex_to_rgb(colour)
    return f"rgba({red},{green},{blue},{0.9 if seen else 0.25})"


def _words(row: dict[str, Any]) -> str:
    layers = ", ".join(map(str, row["layers"]))
    layers = f"layer{'s' * (', ' in layers)} {layers}"
    probe = f"ridge {row['penalty']:g}" if _is_number(row["penalty"]) else "one probe per answer"
    first = f" to generated token {row['first_k']:g}" if _is_number(row.get("first_k")) else ""
    length = row.get("strength")
    fixed = f", fixed length x{length:g}" if _is_number(length) else ""
    return (
        f"{row['direction']}, {probe}, {layers}, {row['positions']}{first}, "
        f"threshold {row['threshold']:g}{fixed}"
    )


def _is_number(value: float | None) -> bool:
    """Tell a number from the gaps that a table read from JSON (None) or built here (NaN) has."""
    return value is not None and value == value
