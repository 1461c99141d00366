"""What a steering does to the task that it was made for, and to others: paired differences."""

from typing import Any

import pandas as pd
from plotly.subplots import make_subplots

from figures import results, save
from mera_tl.plots import style


def main() -> None:
    df = results("side_effects")
    df["of"] = df["source"].where(
        df["model"] == "organism", df["source"] + " (" + df["model"] + ")"
    )
    df["of"] = df["of"].where(df["certified"], df["of"] + ", not certified")
    figure = make_subplots(2, 3, subplot_titles=[*df["of"].unique()], horizontal_spacing=0.14)
    for number, (_, rows) in enumerate(df.groupby("of", sort=False)):
        draw(figure, rows, row=1 + number // 3, col=1 + number % 3)
    figure.update_xaxes(range=[100 * df["low"].min() - 5, 100 * df["high"].max() + 5])
    figure.update_yaxes(autorange="reversed", tickfont_size=10)
    figure.update_layout(height=560, meta={"min_width": 700})
    sizes = ", ".join(f"{n} ({model})" for model, n in df.groupby("model")["n"].max().items())
    caption = f"steered minus unsteered, points, 95 % intervals; examples per task: {sizes}"
    title = "A certified steering helps its own task; elsewhere it may harm"
    save(style.finish(figure, title, caption, showlegend=False), "side_effects")


def draw(figure: Any, rows: pd.DataFrame, **place: int) -> None:
    """Draw one steering: a dot and its interval per task, blue its own."""
    points, own = 100 * rows[["difference", "low", "high"]], rows["task"] == rows["source"]
    error = {
        "array": points["high"] - points["difference"],
        "arrayminus": points["difference"] - points["low"],
    }
    figure.add_scatter(
        x=points["difference"],
        y=rows["task"],
        error_x=error,
        mode="markers",
        marker_color=[style.BLUE if each else style.GREY for each in own],
        **place,
    )
    figure.add_vline(x=0, line_width=1, line_color=style.GREY, **place)


if __name__ == "__main__":
    main()
