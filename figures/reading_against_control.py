"""Where errors can be read, and what moving along four directions corrects, layer by layer."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from scipy.stats import spearmanr

from figures import results, save
from mera_tl.plots import style

NAME = "reading_against_control"
LOOKS = {
    "reading": (style.BLUE, "circle"),
    "contrast": (style.ORANGE, "square"),
    "control": (style.GREEN, "diamond"),
    "random": (style.GREY, "x"),
}
GATED = "where error is predicted"


def main() -> None:
    df = results(NAME).sort_values("layer", kind="stable")
    df["cell"] = df["model"].str.removesuffix("-Instruct") + ": " + df["task"]
    save(layers_and_cosine(df), NAME)


def layers_and_cosine(df: pd.DataFrame) -> go.Figure:
    """Draw gains and AUROC over the layers of each task, and gain against cosine over all."""
    cells = sorted(set(df["cell"]))
    rows = -(-(len(cells) + 1) // 3)
    titles = (*cells, "all: gain along the probe against cosine")
    figure = make_subplots(
        rows=rows, cols=3, subplot_titles=titles, vertical_spacing=0.28 / rows, shared_yaxes=False
    )
    gated = style.rows_where(df, rule=GATED)
    for place, cell in enumerate(cells):
        here = {"row": place // 3 + 1, "col": place % 3 + 1}
        rows_here = style.rows_where(gated, cell=cell)
        probe = style.rows_where(rows_here, direction="reading")
        figure.add_scatter(
            x=probe["layer"],
            y=probe["auroc"] - 0.5,
            name="AUROC of the probe, less .5",
            mode="lines",
            line={"color": style.PINK, "dash": "dot"},
            showlegend=not place,
            **here,
        )
        for direction, (colour, symbol) in LOOKS.items():
            one = style.rows_where(rows_here, direction=direction)
            figure.add_scatter(
                x=one["layer"],
                y=one["gain"],
                error_y={"array": 2 * one["standard_error"], "thickness": 1, "width": 0},
                name=f"gain along {direction}",
                marker={"color": colour, "symbol": symbol},
                mode="lines+markers",
                showlegend=not place,
                **here,
            )
        figure.update_xaxes(title="layer", **here)
    along = style.rows_where(gated, direction="reading")
    here = {"row": rows, "col": len(cells) % 3 + 1}
    for place, cell in enumerate(cells):
        one = style.rows_where(along, cell=cell)
        look = {"color": style.TEMPLATE.layout.colorway[place % 7], "size": 8}
        figure.add_scatter(
            x=one["cosine"], y=one["gain"], text=cell, marker=look, mode="markers", **here,
            showlegend=False,
        )  # fmt: skip
    figure.update_xaxes(title="cosine of probe and gradient", **here)
    figure.update_yaxes(title="gain in accuracy", col=1)
    caption = caption_of(along, len(cells))
    title = "What reads errors and what corrects them are nearly orthogonal"
    return style.finish(
        figure, title, caption, height=150 + 330 * rows, margin_t=140, meta={"min_width": 1100}
    )


def caption_of(along: pd.DataFrame, n_cells: int) -> str:
    """Say how the gains were found, and how they go with the cosine."""
    sizes = along.groupby("model")[["fit", "judge", "n"]].first()
    told = "; ".join(
        f"{model} {n.fit}, {n.judge}, {n.n}"
        for model, n in zip(sizes.index, sizes.itertuples(), strict=True)
    )
    rank = float(spearmanr(along["cosine"], along["gain"])[0])
    return (
        "One layer moved where most error is predicted (bars: 2 s.e.). Examples that fit, that "
        f"choose the length,<br>and test examples: {told}. Rank correlation of cosine and gain "
        f"along the<br>probe: {rank:.2f} over {len(along)} layers of {n_cells} tasks. Published: "
        "arXiv 2605.05715, 2606.24952"
    )


if __name__ == "__main__":
    main()
