"""What a certificate promises and costs: examples needed, error rate, power, size of one test."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mera_tl.plots.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    VERMILLION,
    finish,
    rows_where,
)

BOUND_COLOURS = {"unconditional": BLUE, "mcnemar": ORANGE, "betting": GREEN, "hoeffding": GREY}


def sample_size_curves(df: pd.DataFrame) -> go.Figure:
    """Draw the examples needed against the gain, one line per churn level.

    Takes the rows of `planning.sample_size_table`; gains no number certifies are left out.
    """
    figure = go.Figure()
    df = df.assign(rank=df.groupby("gain")["churn"].rank(method="first")).dropna(subset="n")
    names = {1: "low churn", 2: "mid churn", 3: "high churn"}
    for (rank, name), colour in zip(names.items(), (SKY, BLUE, VERMILLION), strict=True):
        rows = rows_where(df, rank=rank)
        figure.add_scatter(
            x=100 * rows["gain"], y=rows["n"], name=name, mode="lines+markers", line_color=colour
        )
    least = rows_where(df, rank=1)
    figure.add_scatter(
        x=100 * least["gain"],
        y=least["n_hoeffding"],
        name="Hoeffding's bound, low churn",
        mode="lines",
        line={"color": BOUND_COLOURS["hoeffding"], "dash": "dash"},
    )
    ticks = [1, 2, 3, 4, 6, 10, 20, 30]
    figure.update_xaxes(title="expected gain (points)", type="log", tickvals=ticks)
    figure.update_yaxes(
        title="calibration examples for 80 % power", type="log", dtick=1, tickformat=","
    )
    caption = "For 80 % power; churn: share of examples that change at all"
    return finish(figure, "How many examples a certificate needs", caption)


def coverage(df: pd.DataFrame, *, delta: float = 0.05, n: int = 250) -> go.Figure:
    """Draw how often each bound was wrong, and how often it certified a real gain at n examples.

    Takes the records of the experiment `coverage_of_the_guarantee`.
    """
    titles = ("wrong, in the worst scenario", f"certified, with {n} examples")
    figure = make_subplots(cols=2, horizontal_spacing=0.12, subplot_titles=titles)
    for bound, colour in BOUND_COLOURS.items():
        rows = rows_where(df, bound=bound)
        sizes = sorted(set(rows["n"]))
        worst = [rows_where(rows, n=size)["wrong"].max() for size in sizes]
        style: dict[str, object] = {"name": bound, "line_color": colour, "legendgroup": bound}
        style["mode"] = "lines+markers"
        figure.add_scatter(x=sizes, y=worst, row=1, col=1, **style)
        real = rows_where(rows, scenario="hump", n=n)
        style["showlegend"] = False
        figure.add_scatter(x=100 * real["gain"], y=real["certified_0"], row=1, col=2, **style)
    promise = {"x": [min(df["n"]), max(df["n"])], "y": [delta, delta], "name": "promised"}
    figure.add_scatter(**promise, mode="lines", line={"color": GREY, "dash": "dash"})
    tickvals = sorted(set(df["n"]))
    figure.update_xaxes(title="calibration examples", type="log", tickvals=tickvals, row=1, col=1)
    figure.update_xaxes(title="gain at the best of ten thresholds (points)", row=1, col=2)
    figure.update_yaxes(title="share of calibrations", tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(range=[0, 1.3 * delta], dtick=0.01, row=1, col=1)
    caption = "Share of simulated calibrations; dashed: what is promised"
    return finish(figure, "Is the guarantee kept, and at what cost?", caption)


def size_of_the_test(df: pd.DataFrame) -> go.Figure:
    """Draw the greatest error probability of one test against n, as a share of its level.

    Takes the records of the experiment `size_of_the_test`; a line is the worst over true gains.
    """
    figure = go.Figure()
    for bound in sorted(set(df["bound"]), reverse=True):
        for level, dash in zip(
            sorted(set(df["level"]), reverse=True), ("solid", "dot"), strict=False
        ):
            rows = rows_where(df, bound=bound, level=level)
            sizes = sorted(set(rows["n"]))
            figure.add_scatter(
                x=sizes,
                y=[rows_where(rows, n=size)["size"].max() / level for size in sizes],
                name=f"{bound}, level {level:g}",
                mode="lines",
                line={"color": BOUND_COLOURS[bound], "dash": dash},
            )
    figure.add_hline(y=1, line={"color": GREY, "dash": "dash"}, name="promised", showlegend=True)
    ticks = [1, 2, 5, 10, 20, 50, 100, 250, 500, 1000]
    figure.update_xaxes(title="examples", type="log", tickvals=ticks)
    figure.update_yaxes(title="greatest error probability / level", range=[0, 1.1])
    return finish(figure, "Is one test ever wrong too often?", "By enumeration, no simulation")
