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
MODELS = ("smollm2", "gemma3", "organism")


def main() -> None:
    df = results(NAME)
    settings = (
        f"{models_of(df, 'n')},<br>one mark for each split, whole replies; open: not certified"
    )
    save(gain_and_cost(df), NAME, settings=settings)
    save(form_and_answer(df), f"{NAME}_answers")


def gain_and_cost(df: pd.DataFrame) -> go.Figure:
    """Draw the gain on test prompts over the tokens that a reply took, one panel a task.

    Takes the records of `experiments/steer_free_text.py`. A filled mark is certified, or asks for
    no certificate; tokens are relative to the unsteered replies of the same split.
    """
    df = pd.DataFrame(df[df["method"].isin(["no_steering", *LOOKS])])
    asked = dict.fromkeys(zip(df["model"], df["task"], strict=True))
    panels = sorted(asked, key=lambda each: MODELS.index(each[0]))
    unsteered = (
        style.rows_where(df, method="no_steering").set_index(["model", "task", "seed"]).sort_index()
    )
    rates = unsteered.groupby(["model", "task"])["accuracy"].mean()
    told = [(m, t.removeprefix("ifeval_like_"), rates[m, t]) for m, t in panels]
    titles = [f"{model}, {task} (unsteered {rate:.2f})" for model, task, rate in told]
    n_rows = -(-len(panels) // 2)
    gaps = {"vertical_spacing": 0.32 / n_rows, "horizontal_spacing": 0.08}
    figure = make_subplots(n_rows, 2, shared_yaxes=True, subplot_titles=titles, **gaps)
    named = set[str]()
    for (method, look), (place, each) in product(LOOKS.items(), enumerate(panels)):
        rows = style.rows_where(df, model=each[0], task=each[1], method=method)
        if rows.empty:
            continue
        base = unsteered.loc[each]["tokens"]
        figure.add_scatter(
            x=rows["tokens"].to_numpy() / base[rows["seed"]].to_numpy(),
            y=100 * rows["accuracy_change"],
            name=method,
            legendgroup=method,
            showlegend=method not in named,
            mode="markers",
            marker={"color": look[0], "symbol": _symbols(rows, look[1]), "size": 10},
            row=1 + place // 2,
            col=1 + place % 2,
        )
        named.add(method)
    cost = {"type": "log", "range": [-0.35, 0.7], "tickvals": [0.5, 1, 2, 4]}
    figure.update_xaxes(**cost)
    figure.update_xaxes(title="generated tokens, relative to unsteered", row=n_rows)
    figure.update_yaxes(range=[-22, 48], tickvals=[-20, 0, 20, 40])
    figure.update_yaxes(title="gain, points", col=1)
    title = "Steered along an instruction, replies have its form more often than when asked firmly"
    return style.finish(figure, title, "open: not certified", height=130 + 250 * n_rows)


def form_and_answer(df: pd.DataFrame) -> go.Figure:
    """Draw how many replies have the form over how many still hold a right answer.

    Of SmolLM2, means over splits; answers of the questions that have a short one.
    """
    df = pd.DataFrame(df[df["held"].notna() & (df["model"] == "smollm2")])
    df = df.assign(answer=[100 * held["answer"] for held in df["held"]], form=100 * df["accuracy"])
    means = df.groupby(["task", "method"])[["answer", "form"]].mean()
    figure = go.Figure()
    looks = {"no_steering": "circle-open", "instruction": "circle", "prompt_steering": "diamond"}
    for place, task in enumerate(dict.fromkeys(df["task"])):
        colour = style.TEMPLATE.layout.colorway[place % 7]
        name = task.removeprefix("ifeval_like_").replace("_", " ")
        for method, dash in (("instruction", "solid"), ("prompt_steering", "dot")):
            some = means.loc[task].loc[["no_steering", method]]
            figure.add_scatter(
                x=some["answer"],
                y=some["form"],
                mode="lines+markers",
                name=name,
                legendgroup=name,
                showlegend=method == "instruction",
                line={"color": colour, "dash": dash},
                marker={"symbol": [looks[each] for each in some.index], "size": 11},
                hovertext=list(some.index),
            )
    figure.update_xaxes(title="replies that hold a right answer", ticksuffix=" %", range=[0, 65])
    figure.update_yaxes(title="replies that have the form asked for", ticksuffix=" %")
    n = df[df["method"] == "no_steering"].groupby("task")["n"].sum()
    caption = (
        f"smollm2, {n.min()} to {n.max()} test examples a task over three splits;<br>"
        "from unsteered (open) to steered along the instruction (line) or asked more firmly "
        "(dotted)"
    )
    title = "A form is easily had at the cost of the answer"
    return style.finish(figure, title, caption, height=560, margin_t=115)


def _symbols(rows: pd.DataFrame, symbol: str) -> list[str]:
    return [f"{symbol}-open" if said == "ABSTAIN" else symbol for said in rows["decision"]]


if __name__ == "__main__":
    main()
