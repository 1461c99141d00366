"""Raw against SAE: every method in the stream, in latents, and in latents with the correction."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from figures import models_of, results, save
from mera_tl.plots import comparing, style

NAME = "sae_or_raw"


def main() -> None:
    records = results(NAME, "records-*.jsonl")
    # The first split chose the settings; the others test them.
    fresh = pd.DataFrame(records[records["seed"] > 0])
    finding = "Latents help on two planted tasks, where stretched for re-encoding; not on real text"
    settings = f"{models_of(fresh, 'n')}, one split, readout exact_anywhere; hollow: abstained"
    save(raw_against_sae(fresh), NAME, finding=finding, settings=settings)


SPACES = {
    ("raw", "none"): ("residual stream", style.BLUE, "circle"),
    ("sae", "none"): ("SAE latents", style.GREEN, "diamond"),
    ("sae", "gain"): ("SAE latents, gain", style.ORANGE, "square"),
}
"""By space and correction: blue for the stream and green for latents, as wherever they are told
apart."""


def raw_against_sae(df: pd.DataFrame) -> go.Figure:
    """Draw the SPI of each method in raw space and in SAE space, on one scale; hollow: abstained.

    A row of panels a place, a column a `layer`, where that column is there; `correction`, if there,
    tells shifts of latents as they are (none) from those stretched for re-encoding (gain).
    """
    df = comparing.with_place(pd.DataFrame(df[df["method"] != "no_steering"]), space=False)
    df = df.assign(**{c: v for c, v in {"layer": "", "correction": "none"}.items() if c not in df})
    places, methods = style.in_order(df, "where"), style.in_order(df, "method")
    panels = {place: sorted(set(style.rows_where(df, where=place)["layer"])) for place in places}
    figure = make_subplots(
        rows=len(places),
        cols=(n_columns := max(map(len, panels.values()))),
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.05,
        vertical_spacing=min(0.25, 54 / (190 + len(places) * (40 + 28 * len(methods)))),
        subplot_titles=[
            place.replace("<br>", ", ") + (f", layer {layers[i]}" if layers[i] != "" else "")
            if i < len(layers)
            else ""
            for place, layers in panels.items()
            for i in range(n_columns)
        ],
    )
    for row, (place, layers) in enumerate(panels.items(), start=1):
        for col, layer in enumerate(layers, start=1):
            here = style.rows_where(df, where=place, layer=layer)
            _spaces(figure, here, methods, first=row == col == 1, row=row, col=col)
    ticks = {"tickvals": list(range(len(methods))), "ticktext": methods}
    figure.update_yaxes(ticks, range=[len(methods) - 0.5, -0.5], zeroline=False)
    figure.update_xaxes(range=[-1.05, 1.05], dtick=0.5, showticklabels=True)
    figure.update_xaxes(title="SPI", row=len(places))
    height, meta = 190 + len(places) * (40 + 28 * len(methods)), {"min_width": 760}
    caption = f"{comparing.examples_of(df)}; hollow: abstained; gain: stretched for re-encoding"
    title = "Raw directions against SAE latents"
    return style.finish(figure, title, caption, height=height, meta=meta)


def _spaces(
    figure: go.Figure, df: pd.DataFrame, methods: list[str], *, first: bool, **cell: int
) -> None:
    """Draw one panel: a line of marks a method, those of the spaces below one another."""
    for i, ((space, correction), (name, colour, symbol)) in enumerate(SPACES.items()):
        rows = style.rows_where(df, space=space, correction=correction)
        off = (rows["decision"] == "ABSTAIN").tolist()
        figure.add_scatter(
            x=rows["spi"],
            y=[methods.index(method) + 0.26 * (i - 1) for method in rows["method"]],
            mode="markers",
            name=name,
            legendgroup=name,
            showlegend=first and bool(len(rows)),
            marker={
                "color": colour,
                "symbol": [symbol + ("-open" if abstained else "") for abstained in off],
                "size": 8,
            },
            text=[
                method + (": abstained" if abstained else "")
                for method, abstained in zip(rows["method"], off, strict=True)
            ],
            hovertemplate=f"%{{text}}, SPI %{{x:.3f}}<extra>{name}</extra>",
            **cell,
        )


if __name__ == "__main__":
    main()
