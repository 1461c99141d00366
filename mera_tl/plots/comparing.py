"""Methods, tasks, models and spaces side by side. All take benchmark records as a data frame."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mera_tl.plots.style import (
    CHANGES,
    DIVERGING,
    INK,
    colour_of,
    finish,
    in_order,
    mark,
    rows_where,
    symbol_of,
)


def with_place(df: Any, *, space: bool = True) -> pd.DataFrame:
    """Name the place of every record: its task, and model and space where there are several."""
    df = pd.DataFrame(df)  # a list of records does as well
    where: Any = df["task"]
    if len(set(df["model"])) > 1:
        where = df["model"].map(lambda name: str(name).rsplit("/", 1)[-1]) + "<br>" + where
    if space and len(set(df["space"])) > 1:
        where = where + df["space"].map(lambda name: "" if name == "raw" else " (SAE)")
    return df.assign(where=where)


def examples_of(df: pd.DataFrame) -> str:
    """Say in words how many test examples and seeds the records rest on."""
    sizes = sorted(set(df["n"]))
    n = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    seeds = len(set(df["seed"]))
    return f"{n} test examples" + (f", {seeds} seeds" if seeds > 1 else "")


def spi_heatmap(df: pd.DataFrame) -> go.Figure:
    """Draw the mean SPI of every method on every task and model; "-" where all runs abstained."""
    df = with_place(df)
    methods, places = in_order(df, "method"), in_order(df, "where")
    mean = df.pivot_table(index="method", columns="where", values="spi").loc[methods, places]
    abstained = df.assign(off=df["decision"] == "ABSTAIN").pivot_table(
        index="method", columns="where", values="off", aggfunc="min"
    )
    text = [
        ["" if pd.isna(mean.loc[m, p]) else "-" if abstained.loc[m, p] else _signed(mean.loc[m, p])
         for p in places]
        for m in methods
    ]  # fmt: skip
    figure = go.Figure(
        go.Heatmap(
            z=mean.to_numpy(),
            x=places,
            y=methods,
            text=text,
            texttemplate="%{text}",
            textfont={"size": 13, "color": INK},
            colorscale=DIVERGING,
            zmid=0,
            zmin=-1,
            zmax=1,
            xgap=2,
            ygap=2,
            showscale=False,  # every cell says its number
            hovertemplate="%{y} on %{x}: SPI %{z:.3f}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    figure.update_xaxes(showgrid=False, ticks="", tickangle=-35 if len(places) > 2 else 0)
    height = 160 + 34 * len(methods)
    caption = f'{examples_of(df)}; "-" abstained; blue is better, orange is worse'
    meta = {"min_width": 200 + 58 * len(places)}
    return finish(figure, "Steering performance impact", caption, height=height, meta=meta)


def spi_dots(df: pd.DataFrame) -> go.Figure:
    """Draw SPI with intervals, one panel a task; no_steering, which is 0, is left out.

    Hollow marks abstained. Takes columns `spi_low` and `spi_high` where known; several seeds are
    dots of their own.
    """
    steered = pd.DataFrame(df[df["method"] != "no_steering"])
    df = with_place(steered if len(steered) else df)
    figure, methods, places = _panels(df)
    for place, cell in places.items():
        for method in methods:
            rows = rows_where(df, where=place, method=method)
            off = (rows["decision"] == "ABSTAIN").tolist()
            symbol = [symbol_of(method) + ("-open" if abstained else "") for abstained in off]
            error = None
            if "spi_low" in rows:
                error = {
                    "type": "data",
                    "symmetric": False,
                    "array": (rows["spi_high"] - rows["spi"]).fillna(0),
                    "arrayminus": (rows["spi"] - rows["spi_low"]).fillna(0),
                    "thickness": 1.5,
                    "width": 4,
                }
            figure.add_scatter(
                x=rows["spi"],
                y=[method] * len(rows),
                error_x=error,
                mode="markers",
                marker={"color": colour_of(method), "symbol": symbol, "size": 10},
                hovertemplate=f"{method}: SPI %{{x:.3f}}<extra>{place}</extra>",
                showlegend=False,
                **cell,
            )
    figure.update_xaxes(range=[-1.05, 1.05], dtick=0.5)
    figure.update_xaxes(title="SPI: share won or lost", row=len(places))
    known = "spi_low" in df and df["spi_low"].notna().to_numpy().any()
    bars = "; bars: 95 % confidence" if known else ""
    caption = f"{examples_of(df)}; hollow: abstained{bars}"
    height = _height(methods, places)
    return finish(figure, "Which methods help, and how surely", caption, height=height)


def transitions(df: pd.DataFrame) -> go.Figure:
    """Draw what became of the test examples, one bar a method, one panel a task.

    The records' `transitions` hold counts of 0->0, 0->1, 1->0 and 1->1.
    """
    df = with_place(df)
    figure, methods, places = _panels(df)
    for place, cell in places.items():
        rows = rows_where(df, where=place)
        for change, (name, _) in CHANGES.items():
            counts = [
                sum(t[change] for t in rows_where(rows, method=method)["transitions"])
                for method in methods
            ]
            totals = [rows_where(rows, method=method)["n"].sum() for method in methods]
            figure.add_bar(
                x=[
                    100 * count / max(1, total) for count, total in zip(counts, totals, strict=True)
                ],
                y=methods,
                orientation="h",
                name=name,
                legendgroup=change,
                showlegend=cell == {"row": 1, "col": 1},
                marker=mark(change),
                # A bar without length would be drawn as a line.
                marker_line_width=[min(1, count) for count in counts],
                customdata=counts,
                hovertemplate=f"%{{y}}: %{{customdata}} {name} (%{{x:.1f}} %)"
                f"<extra>{place}</extra>",
                **cell,
            )
    figure.update_xaxes(ticksuffix=" %", range=[0, 100], dtick=25, ticklabeloverflow="allow")
    figure.update_xaxes(title="share of test examples", row=len(places))
    caption = f"{examples_of(df)}; against the unsteered answers"
    title = "What became of the examples"
    return finish(figure, title, caption, height=_height(methods, places), barmode="stack")


def _panels(df: pd.DataFrame) -> tuple[go.Figure, list[str], dict[str, dict[str, int]]]:
    """Return axes below one another, methods downwards, and the row and column of every place."""
    methods, places = in_order(df, "method"), in_order(df, "where")
    figure = make_subplots(
        rows=len(places),
        shared_xaxes=True,
        vertical_spacing=min(0.25, 34 / _height(methods, places)),
        subplot_titles=[place.replace("<br>", ", ") for place in places]
        if len(places) > 1
        else None,
    )
    figure.update_annotations(font_size=14, x=0, xanchor="left")
    # Left to itself a category axis cuts off the methods of its ends.
    look = {"categoryorder": "array", "categoryarray": methods[::-1]}
    figure.update_yaxes(look, range=[-0.6, len(methods) - 0.4])
    return figure, methods, {place: {"row": 1 + i, "col": 1} for i, place in enumerate(places)}


def _signed(value: Any) -> str:
    return f"{value:+.2f}" if round(value, 2) else "0.00"


def _height(methods: list[str], places: Any) -> int:
    return 180 + len(places) * (34 + 22 * len(methods))
