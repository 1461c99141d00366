"""Two real models on five tasks: accuracy unsteered, and where a certificate lets a method act."""

import pandas as pd
import plotly.graph_objects as go

from figures import models_of, results, save
from mera_tl.plots import style

NAMES = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "gemma-3-270m"}


def main() -> None:
    rows = results("real_models", "*-*.jsonl")
    rows = rows.assign(where=rows["task"] + ", " + rows["model"].map(NAMES))
    splits = (
        f"splits {rows['seed'].min()} to {rows['seed'].max()}" if rows["seed"].any() else "split 0"
    )
    settings = f"{models_of(rows)}, {splits}, readout options;<br>"
    settings += "a mark for each split; a method is drawn where it is certified to act"
    save(accuracy_by_task(rows), "real_models", settings=settings)


def accuracy_by_task(rows: pd.DataFrame) -> go.Figure:
    """Draw a line per task and model, a mark per split; a method where it is certified to act."""
    base = rows[rows["method"] == "no_steering"]
    asked = rows[rows["decision"].notna()]
    acting = pd.DataFrame(asked[asked["decision"] != "ABSTAIN"])
    marks = {"mode": "markers", "orientation": "h"}
    figure = go.Figure()
    figure.add_scatter(
        x=base["majority"],
        y=base["where"],
        name="always the most frequent answer",
        marker={"symbol": "line-ns-open", "size": 16, "color": style.INK, "line": {"width": 2}},
        **marks,
    )
    figure.add_scatter(
        x=base["accuracy"],
        y=base["where"],
        name="unsteered",
        marker={"symbol": "circle-open", "size": 11, "color": style.GREY, "line": {"width": 2}},
        **marks,
    )
    for method in style.in_order(acting, "method"):
        some = acting[acting["method"] == method]
        look = {"symbol": style.symbol_of(method), "size": 11, "color": style.colour_of(method)}
        figure.add_scatter(x=some["accuracy"], y=some["where"], name=method, marker=look, **marks)
    steered = acting[acting["method"] != "flip"]
    title = (
        f"On real models {len(acting)} of {len(asked)} certificates let a method act: "
        f"{len(steered)} steer, {len(acting) - len(steered)} flip answers"
    )
    sizes = f"{base['n_test'].min()} to {base['n_test'].max()}"
    caption = f"accuracy on {sizes} test examples a split; methods are drawn where certified to act"
    figure.update_xaxes(title="accuracy on test", range=[0, 1.02])
    figure.update_yaxes(autorange="reversed")
    return style.finish(figure, title, caption, height=130 + 34 * base["where"].nunique())


if __name__ == "__main__":
    main()
