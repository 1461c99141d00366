"""Where errors can be read: held-out error per layer, what a probe predicts, its direction."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

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
METRICS = {
    "rmse": ("RMSE of predicted error", "How well the error is predicted"),
    "auroc": ("AUROC", "How well incorrect answers are told from correct ones"),
    "r2": ("R² of predicted error", "How much of the error is explained"),
}
_KINDS = {"ridge": BLUE, "logistic": SKY, "contrastive": VERMILLION, "lasso": PINK}
_KINDS |= {f"{rank}_regression": ORANGE for rank in ("best", "median", "worst")}
"""Of probes: the colours of the methods that steer with them, as far as these have one."""
N_SHIFTS = 60
"""Shifts drawn at most; more would cover the examples."""
_BIN, _LANDED = 0.025, 1e-3
"""Width of a bin of predicted error, and how far above the threshold rounding may leave what was
moved onto it."""
_FIXED = "; every shift has the same fixed length, so that it need not end at the threshold"


def probe_error(df: pd.DataFrame, *, metric: str = "rmse", n: int | None = None) -> go.Figure:
    """Draw a held-out metric of probes over the layers, beside the constant prediction.

    Takes the rows of `LinearProbe.table` with a column `probe` that names each probe (kind,
    position, space); bars are the standard deviation over folds.
    """
    figure = go.Figure()
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
            line_color=_KINDS.get(name.partition(",")[0], GREY),
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
    # Of many layers plotly labels as many as there is room for.
    figure.update_xaxes(title="layer (resid_post)", tickvals=layers if len(layers) <= 12 else None)
    axis, title = METRICS.get(metric, (metric, metric))
    figure.update_yaxes(title=axis)
    examples = "" if n is None else f" of {n:,} training examples"
    caption = f"Held-out folds{examples}; bars: standard deviation over folds"
    return finish(figure, title, caption)


def predicted_error(
    df: pd.DataFrame,
    *,
    method: str,
    layer: int,
    threshold: float | None = None,
    fixed: bool = False,
) -> go.Figure:
    """Draw the distribution of the predicted error before and after a steered layer.

    Takes columns `before`, `after` (in [0, 1]), `correct_before` and `correct_after`: the answers
    of the unsteered and of the steered run. `fixed` says that shifts have a fixed length.
    """
    titles = ("before, by the unsteered answer", "after, by the steered answer")
    figure = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.12, subplot_titles=titles)
    figure.update_annotations(x=0, xanchor="left", font_size=14)
    # Bins are closed on the right and end at the threshold: what lands on it has not exceeded it.
    start = (threshold or 0.0) % _BIN - _BIN
    for row, stage in enumerate(("before", "after"), start=1):
        right = df[f"correct_{stage}"].to_numpy(bool)
        _histogram(figure, df[stage].to_numpy(), right, start, row)
    above = ""
    if threshold is not None:
        for row in (1, 2):
            _dashed(figure, threshold, f"threshold {threshold:.3g}", row=row, col=1)
        n_above = [sum(df[stage] > threshold + _LANDED) for stage in ("before", "after")]
        above = f"; {n_above[0]:,} above the threshold before, {n_above[1]:,} after"
    # Ticks are given: where all land in one bin, plotly would label that bin alone.
    figure.update_xaxes(range=[0, 1], tick0=0, dtick=0.2)
    figure.update_xaxes(title="predicted error at the final prompt token", row=2, col=1)
    figure.update_yaxes(title="examples")
    caption = f"{method}, layer {layer}, {len(df):,} test examples{above}{_FIXED if fixed else ''}"
    title = "Predicted error before and after steering"
    return finish(figure, title, caption, barmode="stack", bargap=0, height=520)


def _histogram(
    figure: go.Figure, error: np.ndarray, right: np.ndarray, start: float, row: int
) -> None:
    """Draw how often each error was predicted, of right and of wrong answers."""
    bins = np.ceil((error - _LANDED - start) / _BIN).clip(1)
    for correct, name, colour in _ANSWERS:
        which, counts = np.unique(bins[right == correct], return_counts=True)
        figure.add_bar(
            x=start + _BIN * (which - 0.5),
            y=counts,
            width=_BIN,
            name=name,
            legendgroup=name,
            showlegend=row == 1,
            marker_color=colour,
            hovertemplate=f"%{{y}} {name}, predicted %{{x:.2f}} ± .01<extra></extra>",
            row=row,
            col=1,
        )


def geometry(
    df: pd.DataFrame,
    *,
    method: str,
    layer: int,
    limit: float | None = None,
    fixed: bool = False,
) -> go.Figure:
    """Draw activations along the probe's score and the leading direction orthogonal to it.

    Takes columns `score`, `other`, `correct` and, NaN where an example is left alone, `score_after`
    and `other_after`, and `in_plane`, the share of the shift that lies in this plane; `limit` is
    the score above which the steering acts; `fixed` says that shifts have a fixed length.
    """
    figure, moved = go.Figure(), df["score_after"].notna().to_numpy()
    for off, shown in ((True, pd.DataFrame(df[~moved])), (False, pd.DataFrame(df[moved]))):
        for correct, name, colour in _ANSWERS:
            rows = rows_where(shown, correct=correct)
            if not len(rows):
                continue
            symbol = "circle" if off else "circle-open"
            figure.add_scatter(
                x=rows["score"],
                y=rows["other"],
                mode="markers",
                name=f"{name}, {'left alone' if off else 'moved'} ({len(rows):,})",
                marker={"color": colour, "size": 6, "opacity": 0.7, "symbol": symbol},
            )
    if moved.any():
        _shifts(figure, pd.DataFrame(df[moved]))
    if limit is not None:
        _dashed(figure, limit, "threshold")
    figure.update_xaxes(title="error direction: the probe's score (log-odds)", zeroline=False)
    figure.update_yaxes(title="leading other direction (stream units)", zeroline=False)
    caption = f"{method}, layer {layer}, {len(df):,} training examples, final prompt token"
    told = "; abstained: nothing is moved"
    if moved.any():
        told = f"; {100 * df['in_plane'].mean():.0f} % of a shift's length lies in this plane"
        told += _FIXED if fixed else ""
    title = "Where error lies, and which way steering moves"
    return finish(figure, title, caption + told, height=520)


def cloud(
    x: Sequence[float], y: Sequence[float], correct: Sequence[bool], *, layer: int
) -> go.Figure:
    """Draw activations in the plane of two axes, one point an example."""
    figure, rows = go.Figure(), pd.DataFrame({"x": x, "y": y, "correct": correct})
    for is_correct, name, colour in _ANSWERS:
        some = rows_where(rows, correct=is_correct)
        marker = {"color": colour, "size": 6, "opacity": 0.7}
        figure.add_scatter(x=some["x"], y=some["y"], mode="markers", name=name, marker=marker)
    figure.update_xaxes(title="first principal axis", zeroline=False)
    figure.update_yaxes(title="second principal axis", zeroline=False)
    caption = f"layer {layer}, {len(rows):,} examples; axes of greatest variance, not of error"
    return finish(figure, "Activations and answers", caption)


def _shifts(figure: go.Figure, moved: pd.DataFrame) -> None:
    """Draw where examples land, and the way there of some."""
    shown = moved[:: -(-len(moved) // N_SHIFTS)]
    gap = np.full(len(shown), np.nan)  # ends one line before the next begins
    figure.add_scatter(
        x=np.stack([shown["score"], shown["score_after"], gap], axis=1).ravel(),
        y=np.stack([shown["other"], shown["other_after"], gap], axis=1).ravel(),
        mode="lines",
        name=f"shift ({len(shown):,} of {len(moved):,})",
        line={"color": GREEN, "width": 1},
        opacity=0.6,
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=moved["score_after"],
        y=moved["other_after"],
        mode="markers",
        name="where they land",
        marker={"color": GREEN, "size": 4, "symbol": "diamond"},
    )


def _dashed(figure: go.Figure, x: float, name: str, row: Any = None, col: Any = None) -> None:
    line = {"color": GREEN, "width": 2, "dash": "dash"}
    once = row in (None, 1)
    figure.add_vline(x=x, line=line, name=name, showlegend=once, row=row, col=col)
