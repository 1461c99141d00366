"""What a certificate costs: the examples it needs."""

import pandas as pd
import plotly.graph_objects as go

from mera_tl.plots.style import BLUE, BOUND_COLOURS, SKY, VERMILLION, finish, rows_where


def sample_size_curves(df: pd.DataFrame) -> go.Figure:
    """Draw the examples needed against the gain, one line per churn level.

    Takes the rows of `sample_size_table`; gains that no number certifies are left out.
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
