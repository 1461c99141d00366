"""What following an instruction gains and costs in tokens: steering beside asking again."""

from itertools import product

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from figures import models_of, results, save
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
    df = results(NAME)
    settings = f"{models_of(df, 'n')}, one mark for each split, whole replies; open: not certified"
    save(gain_and_cost(df), NAME, settings=settings)


def gain_and_cost(df: pd.DataFrame) -> go.Figure:
    """Draw the gain on test prompts over the tokens that a reply took, one panel a task.

    Takes the records of `experiments/steer_free_text.py`. A filled mark is certified, or asks for
    no certificate; tokens are relative to the unsteered replies of the same split.
    """
    df = pd.DataFrame(df[df["method"].isin(["no_steering", *LOOKS])])
    tasks = list(dict.fromkeys(df["task"]))
    base = style.rows_where(df, method="no_steering")
    rates = base.groupby("task")["accuracy"].mean()
    unsteered = base.set_index(["task", "seed"])["tokens"]
    titles = [f"{t.removeprefix('ifeval_like_')} (unsteered {rates[t]:.2f})" for t in tasks]
    figure = make_subplots(rows=-(-len(tasks) // 2), cols=2, subplot_titles=titles)
    named = set[str]()
    for (method, look), (place, task) in product(LOOKS.items(), enumerate(tasks)):
        rows = style.rows_where(df, task=task, method=method)
        if rows.empty:
            continue
        cost = [t / unsteered[task, seed] for t, seed in zip(rows["tokens"], rows["seed"])]  # noqa: B905
        symbols = [f"{look[1]}-open" if d == "ABSTAIN" else look[1] for d in rows["decision"]]
        figure.add_scatter(
            x=cost,
            y=100 * rows["accuracy_change"],
            name=method,
            legendgroup=method,
            showlegend=method not in named,
            mode="markers",
            marker={"color": look[0], "symbol": symbols, "size": 10},
            row=1 + place // 2,
            col=1 + place % 2,
        )
        named.add(method)
    cost = {"type": "log", "range": [-0.35, 0.7], "tickvals": [0.5, 1, 2, 4]}
    figure.update_xaxes(title="generated tokens, relative to unsteered", **cost)
    figure.update_yaxes(title="gain in points", range=[-20, 50])
    sizes = " to ".join(map(str, sorted({df["n"].min(), df["n"].max()})))
    caption = f"{sizes} test prompts a split, one mark for each split; open: not certified"
    title = "Moved along an instruction, replies follow it more often: two tasks of three"
    return style.finish(figure, title, caption, height=120 + 340 * -(-len(tasks) // 2))


if __name__ == "__main__":
    main()
