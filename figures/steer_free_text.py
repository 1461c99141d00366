"""What following an instruction gains and costs in tokens: steering beside asking again."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from figures import results, save
from mera_tl.plots import style

NAME = "steer_free_text"
LOOKS = {
    "instruction": (style.GREEN, "circle"),
    "kind_controlled": (style.BLUE, "circle"),
    "prompt_controlled": (style.GREEN, "diamond"),
    "contrastive": (style.VERMILLION, "circle"),
    "prompt_steering": (style.GREY, "diamond"),
    "retry": (style.PINK, "circle"),
    "best_of_k": (style.PINK, "square"),
    "best_of_k_scorer": (style.PINK, "star"),
}


def main() -> None:
    save(gain_and_cost(results(NAME)), NAME)


def gain_and_cost(df: pd.DataFrame) -> go.Figure:
    """Draw the gain on test prompts over the tokens that a reply took, one panel a task.

    Takes the records of `experiments/steer_free_text.py`. A filled mark is certified, or asks for
    no certificate; the vertical line is the unsteered reply.
    """
    tasks = list(dict.fromkeys(df["task"]))
    base = style.rows_where(df, method="no_steering").set_index(["task", "seed"])
    rates = base["accuracy"].groupby("task").mean()
    titles = [f"{t.removeprefix('ifeval_like_')} (unsteered {rates[t]:.2f})" for t in tasks]
    figure = make_subplots(
        rows=-(-len(tasks) // 3), cols=3, subplot_titles=titles, vertical_spacing=0.14
    )
    for (method, (colour, symbol)), (place, task) in (
        (look, each) for look in LOOKS.items() for each in enumerate(tasks)
    ):
        rows = style.rows_where(df, task=task, method=method)
        abstained = rows.get("decision", pd.Series(index=rows.index, dtype=object)) == "ABSTAIN"
        figure.add_scatter(
            x=rows["tokens"],
            y=100 * rows["accuracy_change"],
            name=method,
            legendgroup=method,
            showlegend=place == 0,
            mode="markers",
            marker={
                "color": colour,
                "symbol": [f"{symbol}-open" if off else symbol for off in abstained],
                "size": 10,
            },
            row=1 + place // 3,
            col=1 + place % 3,
        )
    for place, task in enumerate(tasks):
        at = float(base["tokens"].groupby("task").mean()[task])
        where = {"row": 1 + place // 3, "col": 1 + place % 3}
        figure.add_vline(x=at, line={"color": style.LINE, "width": 1}, **where)  # pyright: ignore[reportArgumentType]
    figure.update_xaxes(title="generated tokens per prompt", type="log")
    figure.update_yaxes(title="gain in points")
    sizes = " to ".join(map(str, sorted({df["n"].min(), df["n"].max()})))
    caption = f"{sizes} test prompts a split, a mark a split; open: not certified; line: unsteered"
    title = "Following instructions: gain and cost"
    return style.finish(figure, title, caption, height=360 * -(-len(tasks) // 3))


if __name__ == "__main__":
    main()
