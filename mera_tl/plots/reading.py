"""Where errors can be read: held-out error per layer, what a probe predicts, its direction."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mera_tl.plots.style import (
    BLUE,
    CORRECT,
    GREEN,
    GREY,
    INCORRECT,
    ORANGE,
    PINK,
    SKY,
    VERMILLION,
    finish,
    in_order,
    rows_where,
)

_ANSWERS = ((True, "answered correctly", CORRECT), (False, "answered incorrectly", INCORRECT))
_METRICS = {
    "rmse": ("RMSE of predicted error", "How well the error is predicted"),
    "auroc": ("AUROC", "How well incorrect answers are told from correct ones"),
    "r2": ("R² of predicted error", "How much of the error is explained"),
}
N_SHIFTS = 60
"""Shifts drawn at most; more would cover the examples."""


def probe_error(df: pd.DataFrame, *, metric: str = "rmse", n: int | None = None) -> go.Figure:
    """Draw a held-out metric of probes over the layers, beside the constant prediction.

    Takes the rows of `LinearProbe.table` with a column `probe` that names each probe (kind,
    position, space); bars are the standard deviation over folds.
    """
    figure = go.Figure()
    colours = (BLUE, ORANGE, GREEN, VERMILLION, SKY, PINK)
    probes = in_order(df, "probe")
    for i, name in enumerate(probes):
        rows = rows_where(df, probe=name).sort_values("layer")
        shift = 0.06 * (i - (len(probes) - 1) / 2)  # bars beside one another, not on top
        figure.add_scatter(
            x=rows["layer"] + shift,
            y=rows[metric],
            error_y={"array": rows[f"{metric}_sd"], "thickness": 1.2, "width": 3},
            name=name,
            mode="lines+markers",
            line_color=colours[i % len(colours)],
            customdata=rows["layer"],
            hovertemplate=f"{name}, layer %{{customdata}}: %{{y:.3f}}<extra></extra>",
        )
    dummy = rows_where(df, probe=probes[0]).sort_values("layer")
    figure.add_scatter(
        x=dummy["layer"],
        y=dummy[f"{metric}_dummy"],
        name="constant prediction",
        mode="lines",
        line={"color": GREY, "dash": "dash"},
    )
    layers = sorted(set(df["layer"]))
    step = max(1, len(layers) // 12)
    figure.update_xaxes(title="layer (resid_post)", tickvals=layers[::step])
    axis, title = _METRICS.get(metric, (metric, metric))
    figure.update_yaxes(title=axis)
    examples = "" if n is None else f" of {n:,} training examples"
    caption = f"Held-out folds{examples}; bars: standard deviation over folds"
    return finish(figure, title, caption)


def predicted_error(df: pd.DataFrame, *, threshold: float | None = None) -> go.Figure:
    """Draw the error that the probe predicts before steering, by correctness of the answer.

    Takes columns `predicted` (in [0, 1]) and `correct`. What lies right of `threshold` is steered:
    after the shift the probe predicts `threshold` there.
    """
    figure = go.Figure()
    for correct, name, colour in _ANSWERS:
        predicted = rows_where(df, correct=correct)["predicted"]
        figure.add_histogram(
            x=predicted,
            name=f"{name} ({len(predicted):,})",
            marker_color=colour,
            xbins={"start": 0, "end": 1, "size": 0.025},
        )
    steered = ""
    if threshold is not None:
        _dashed(figure, threshold, f"threshold {threshold:.3g}")
        steered = f", {sum(df['predicted'] > threshold):,} above the threshold"
    figure.update_xaxes(title="predicted error before steering", range=[0, 1])
    figure.update_yaxes(title="examples")
    caption = f"{len(df):,} examples{steered}; highest score in the steered scope of each"
    return finish(figure, "What the probe predicts", caption, barmode="stack")


def geometry(df: pd.DataFrame, *, limit: float | None = None, layer: int = 0) -> go.Figure:
    """Draw activations along the probe's score and the leading direction orthogonal to it.

    Takes columns `score`, `other`, `correct` and, where steering moves an example, `score_after`
    and `other_after`; `limit` is the score that steering allows.
    """
    figure = go.Figure()
    moved = df.dropna(subset="score_after") if "score_after" in df else df[:0]
    if len(moved):
        shown = moved[:: -(-len(moved) // N_SHIFTS)]
        gap = np.full(len(shown), np.nan)  # ends one line before the next begins
        figure.add_scatter(
            x=np.stack([shown["score"], shown["score_after"], gap], axis=1).ravel(),
            y=np.stack([shown["other"], shown["other_after"], gap], axis=1).ravel(),
            mode="lines",
            name=f"shift ({len(shown):,} of {len(moved):,})",
            line={"color": GREEN, "width": 1},
            opacity=0.5,
            hoverinfo="skip",
        )
    for correct, name, colour in _ANSWERS:
        rows = rows_where(df, correct=correct)
        marker: dict[str, object] = {"color": colour, "size": 6, "opacity": 0.6}
        count = f"{name} ({len(rows):,})"
        figure.add_scatter(
            x=rows["score"], y=rows["other"], mode="markers", name=count, marker=marker
        )
    if limit is not None:
        _dashed(figure, limit, "limit")
    figure.update_xaxes(title="score: log-odds of error along the probe", zeroline=False)
    figure.update_yaxes(title="leading other direction", zeroline=False)
    caption = f"resid_post of layer {layer}, {len(df):,} examples" + (
        "; steering moves onto the limit" if limit is not None else "; abstained: nothing is moved"
    )
    return finish(figure, "Which way is error", caption)


def _dashed(figure: go.Figure, x: float, name: str) -> None:
    line = {"color": GREEN, "width": 2, "dash": "dash"}
    figure.add_vline(x=x, line=line, name=name, showlegend=True)
