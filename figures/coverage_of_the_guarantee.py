"""How often the guarantee is wrong, and how often it lets a real gain through."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from figures import results, save
from mera_tl.plots import style

NAME = "coverage_of_the_guarantee"


def main() -> None:
    save(coverage(results(NAME)), NAME)


def coverage(df: pd.DataFrame, *, delta: float = 0.05, n: int = 250) -> go.Figure:
    """Draw how often each bound was wrong, and how often it certified a real gain at n examples.

    Takes the records of the experiment `coverage_of_the_guarantee`.
    """
    titles = ("wrong, in the worst scenario", f"certified, with {n} examples")
    figure = make_subplots(cols=2, horizontal_spacing=0.12, subplot_titles=titles)
    for bound, colour in style.BOUND_COLOURS.items():
        rows = style.rows_where(df, bound=bound)
        sizes = sorted(set(rows["n"]))
        worst = [style.rows_where(rows, n=size)["wrong"].max() for size in sizes]
        look: dict[str, object] = {"name": bound, "line_color": colour, "legendgroup": bound}
        look["mode"] = "lines+markers"
        figure.add_scatter(x=sizes, y=worst, row=1, col=1, **look)
        real = style.rows_where(rows, scenario="hump", n=n)
        look["showlegend"] = False
        figure.add_scatter(x=100 * real["gain"], y=real["certified_0"], row=1, col=2, **look)
    promise = {"x": [min(df["n"]), max(df["n"])], "y": [delta, delta], "name": "promised"}
    figure.add_scatter(**promise, mode="lines", line={"color": style.GREY, "dash": "dash"})
    tickvals = sorted(set(df["n"]))
    figure.update_xaxes(title="calibration examples", type="log", tickvals=tickvals, row=1, col=1)
    figure.update_xaxes(title="gain at the best of ten thresholds (points)", row=1, col=2)
    figure.update_yaxes(title="share of calibrations", rangemode="tozero")
    figure.update_yaxes(range=[0, 1.3 * delta], dtick=0.01, row=1, col=1)
    draws = int(df["draws"].min())
    caption = (
        f"At least {draws:,} simulated calibrations per point, ten thresholds, delta {delta:g}"
    )
    return style.finish(figure, "The guarantee holds, and lets real gains through", caption)


if __name__ == "__main__":
    main()
