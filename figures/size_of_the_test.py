"""How close the exact test comes to the error it is allowed, by enumeration."""

import pandas as pd
import plotly.graph_objects as go

from figures import results, save
from mera_tl.plots import style

NAME = "size_of_the_test"


def main() -> None:
    save(size_of_the_test(results(NAME)), NAME)


def size_of_the_test(df: pd.DataFrame) -> go.Figure:
    """Draw the greatest error probability of one test against n, as a share of its level.

    Takes the records of the experiment `size_of_the_test`; a line is the worst over true gains.
    """
    figure = go.Figure()
    for bound in sorted(set(df["bound"]), reverse=True):
        for level, dash in zip(
            sorted(set(df["level"]), reverse=True), ("solid", "dot"), strict=False
        ):
            rows = style.rows_where(df, bound=bound, level=level)
            sizes = sorted(set(rows["n"]))
            figure.add_scatter(
                x=sizes,
                y=[style.rows_where(rows, n=size)["size"].max() / level for size in sizes],
                name=f"{bound}, level {level:g}",
                mode="lines",
                line={"color": style.BOUND_COLOURS[bound], "dash": dash},
            )
    figure.add_hline(
        y=1, line={"color": style.GREY, "dash": "dash"}, name="promised", showlegend=True
    )
    ticks = [1, 2, 5, 10, 20, 50, 100, 250, 500, 1000]
    figure.update_xaxes(title="examples", type="log", tickvals=ticks)
    figure.update_yaxes(title="greatest error probability / level", range=[0, 1.1])
    return style.finish(
        figure, "Is one test ever wrong too often?", "By enumeration, no simulation"
    )


if __name__ == "__main__":
    main()
