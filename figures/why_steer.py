"""The classifier, the flip and the families: every task, few labels, and what a gain breaks."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from figures import NoResults, models_of, results, save
from mera_tl.plots import spi_heatmap, style

NAME = "why_steer"


def main() -> None:
    table = results(NAME, "table/*.jsonl")
    labels = results(NAME, "labels/*.jsonl")
    told = f"{models_of(table, 'n')}, readout options;<br>{splits_of(table)}"
    finding = "A classifier corrects most; the search and the flip come close"
    settings = f'{told}; mean SPI; "-": every split abstained; blue is better, orange is worse'
    shown = spi_heatmap(with_verdict(table).assign(space="raw"))
    save(shown, "why_steer", finding=finding, settings=settings)
    settings = f"{told}; sums over the (task, split) cells; top left is better"
    save(gain_against_harm(table), "why_steer_harm", settings=settings)
    settings = f"{models_of(labels, 'n')}, two splits, readout options; SPI by training labels"
    save(few_labels(labels), "why_steer_labels", settings=settings)


def with_verdict(df: pd.DataFrame) -> pd.DataFrame:
    """Add what `recommend` chose as a row of its own."""
    verdict = df[df["recommended"]].assign(method="recommend")
    alone = verdict["verdict"].isin(["leave alone", "withhold"])
    # Withholding corrects nothing, and its SPI counts what is withheld as wrong.
    verdict.loc[alone, ["spi", "decision"]] = [0.0, "ABSTAIN"]
    return pd.concat([df[df["method"] != "withhold"], verdict], ignore_index=True)


def splits_of(df: pd.DataFrame) -> str:
    """Say how many splits there are of each model's tasks."""
    most = df.groupby(["model", "task"])["seed"].nunique().groupby("model").agg(["min", "max"])
    told = (f"{m} {' to '.join(map(str, sorted({*n})))}" for m, n in most.T.items())
    return f"splits: {', '.join(told)}"


def gain_against_harm(df: pd.DataFrame) -> go.Figure:
    """Draw, for each method, recoveries over what was wrong and regressions over what was right."""
    df = df[(df["method"] != "withhold") & (df["method"] != "no_steering")]
    real = df["model"] != "organism"
    parts = {"the embedded model": df[~real], "real models": df[real]}
    parts = {where: part for where, part in parts.items() if len(part)}
    cells = [len(part.groupby(["model", "task", "seed"])) for part in parts.values()]
    titles = [f"{where}, {n} cells" for where, n in zip(parts, cells, strict=True)]
    figure = make_subplots(cols=len(parts), subplot_titles=titles, shared_yaxes=True)
    for column, part in enumerate(parts.values(), 1):
        changes = pd.json_normalize(part["transitions"].tolist()).set_index(part.index)
        sums = changes.assign(method=part["method"]).groupby("method", sort=False).sum()
        recovered = sums["0->1"] / (sums["0->1"] + sums["0->0"])
        broken = sums["1->0"] / (sums["1->0"] + sums["1->1"])
        for method in sums.index:
            look = {"color": style.colour_of(method), "symbol": style.symbol_of(method)}
            figure.add_scatter(
                x=[100 * broken[method]],
                y=[100 * recovered[method]],
                mode="markers",
                name=method,
                legendgroup=method,
                marker={"size": 12, **look},
                showlegend=column == 1,
                row=1,
                col=column,
            )
    figure.update_xaxes(title="right answers that became wrong", ticksuffix=" %")
    figure.update_yaxes(title="wrong answers that became right", ticksuffix=" %", col=1)
    caption = "sums over (task, split) cells, test examples; top left is better"
    told = {"height": 620, "margin": {"b": 190}}
    return style.finish(figure, "What each way corrects, and what it breaks", caption, **told)


def few_labels(df: pd.DataFrame) -> go.Figure:
    """Draw the SPI of each method against the number of training labels, a panel a task."""
    df = df[df["method"] != "no_steering"]
    if df.empty:
        raise NoResults("why_steer has no part `labels`.")
    df = df.assign(where=df["model"] + ": " + df["task"])
    places = list(dict.fromkeys(df["where"]))
    columns = min(3, len(places))
    rows = -(-len(places) // columns)
    figure = make_subplots(rows=rows, cols=columns, subplot_titles=places, shared_yaxes=True)
    for place, where in enumerate(places):
        part = df[df["where"] == where]
        for method in dict.fromkeys(part["method"]):
            mean = part[part["method"] == method].groupby("labels")["spi"].mean()
            look = {"color": style.colour_of(method), "symbol": style.symbol_of(method), "size": 8}
            figure.add_scatter(
                x=mean.index,
                y=mean,
                name=method,
                legendgroup=method,
                mode="lines+markers",
                marker=look,
                showlegend=place == 0,
                row=place // columns + 1,
                col=place % columns + 1,
            )
    figure.update_xaxes(type="log", tickvals=sorted(set(df["labels"])))
    figure.update_yaxes(range=[-0.2, 1.05])
    n = sorted(set(df["n"]))
    caption = f"SPI by number of training labels; {n[0]} test examples, mean of the splits"
    told = {"height": 180 + 260 * rows, "margin": {"b": 110}}
    return style.finish(figure, "Few labels do not favour steering", caption, **told)


if __name__ == "__main__":
    main()
