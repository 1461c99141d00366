"""Where errors can be read: by layer, features and position; by token; how rightly; elsewhere."""

from itertools import product

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from figures import models_of, results, save
from mera_tl.plots import reading, style

NAME = "probe_error_by_layer"


def main() -> None:
    df, rows = placed("layers"), ["place", "features", "position", "layer"]
    for metric, best in (("auroc", pd.Series.idxmax),):
        chosen = df.loc[df.reset_index(drop=True).groupby(rows)[metric].agg(best)]
        columns = {f"untouched_{metric}": "value", f"{metric}_sd": "sd", f"{metric}_dummy": "dummy"}
        chosen = chosen.drop(columns=metric).rename(columns=columns)
        chosen = chosen.sort_index()
        two = pd.DataFrame(chosen[chosen["place"].isin(TWO)])
        how = "penalties chosen on folds; bars: s.d. over the folds"
        keep(probe_overlay(chosen, metric=metric), f"probe_{metric}_by_layer_all", chosen, how)
        keep(probe_overlay(two, metric=metric), f"probe_{metric}_by_layer", two, how)
    observed, tokens = placed("observed"), placed("tokens")
    how = "best layer, final prompt token, in tenths"
    keep(predicted_against_observed(observed), "predicted_against_observed", observed, how)
    how = "a ridge probe for each cell; AUROC; .5 is chance"
    keep(layer_by_position(tokens), "layer_by_position", tokens, how)
    transfer = results(NAME, "transfer-*.jsonl")
    keep(transfer_matrix(transfer), "transfer_of_probes", transfer, "AUROC; .5 is chance")


FINDINGS = {
    "probe_auroc_by_layer": "Errors can be read in every layer",
    "probe_auroc_by_layer_all": "Errors can be read in every layer of five tasks",
    "predicted_against_observed": "Errors are about as frequent as they are predicted to be",
    "layer_by_position": "Where in a prompt an error can be read differs by task",
    "transfer_of_probes": "A probe reads the errors of its own task, rarely of another",
}


def keep(figure: go.Figure, name: str, df: pd.DataFrame, how: str) -> None:
    """Save a figure with what was found, and on what."""
    settings = f"{models_of(df)}, one split, readout exact_anywhere;<br>{how}"
    save(figure, name, finding=FINDINGS[name], settings=settings)


TWO = ("organism<br>spam_cue", "sms-llama<br>sms_spam")
"""Of the main figure: a planted failure, and real text."""


def placed(kind: str) -> pd.DataFrame:
    df = results(NAME, f"{kind}-*.jsonl")
    return df.assign(place=df["model"] + "<br>" + df["task"]).reset_index(drop=True)


FEATURES = {"raw": ("residual stream", style.BLUE), "sae": ("SAE latents", style.GREEN)}


POSITIONS = {"last": ("final prompt token", "solid"), "exact": ("answer token", "dot")}


def probe_overlay(df: pd.DataFrame, *, metric: str = "auroc") -> go.Figure:
    """Draw a metric over the layers: two readout positions, stream and latents, a panel a place.

    Takes columns `place`, `layer`, `features` (raw or sae), `position` (last or exact), `value` (on
    test examples), `sd` (over the folds that chose), `dummy`, `n` and `n_test`.
    """
    places = style.in_order(df, "place")
    (figure, cells), named = grid_of(places), set()
    for place, cell in zip(places, cells, strict=True):
        here = style.rows_where(df, place=place)
        for (features, (what, colour)), (position, (where, dash)) in product(
            FEATURES.items(), POSITIONS.items()
        ):
            rows = style.rows_where(here, features=features, position=position).sort_values("layer")
            if not len(rows):
                continue
            figure.add_scatter(
                x=rows["layer"] + (0.08 if features == "sae" else 0),
                y=rows["value"],
                error_y={"array": rows["sd"], "thickness": 1.2, "width": 3},
                name=f"{what}, {where}",
                legendgroup=features + position,
                showlegend=(features, position) not in named,
                mode="lines+markers",
                line={"color": colour, "dash": dash},
                customdata=rows["layer"],
                hovertemplate="layer %{customdata}: %{y:.3f}<extra>" + f"{what}, {where}</extra>",
                **cell,
            )
            named.add((features, position))
        dummy = style.rows_where(here, features="raw", position="last").sort_values("layer")
        figure.add_scatter(
            x=dummy["layer"],
            y=dummy["dummy"],
            name="constant prediction",
            legendgroup="dummy",
            showlegend=bool(place == places[0]),
            mode="lines",
            line={"color": style.GREY, "dash": "dash"},
            **cell,
        )
    axis, title = reading.METRICS.get(metric, (metric, metric))
    figure.update_xaxes(title="layer", dtick=1)
    figure.update_yaxes(title=axis, matches="y")  # one scale: panels are compared
    sizes = " and ".join(f"{n:,}" for n in sorted(set(df["n_test"])))
    caption = f"Penalties chosen on folds; {sizes} test examples; bars: s.d. over the folds"
    height = 150 + 250 * -(-len(places) // 2)
    return style.finish(figure, title, caption, height=height, meta={"min_width": 640})


def predicted_against_observed(df: pd.DataFrame) -> go.Figure:
    """Draw observed over predicted error, in bins of equal size, one line a place.

    Takes columns `place`, `predicted`, `observed`, `n_bin` and `n_test`.
    """
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 1],
        y=[0, 1],
        mode="lines",
        name="calibrated",
        line={"color": style.GREY, "dash": "dash"},
    )
    looks = (
        (style.BLUE, "circle"),
        (style.VERMILLION, "diamond"),
        (style.GREEN, "square"),
        (style.PINK, "star"),
    )
    looks += ((style.ORANGE, "triangle-up"), (style.SKY, "triangle-down"))
    for i, place in enumerate(style.in_order(df, "place")):
        rows, (colour, symbol) = style.rows_where(df, place=place), looks[i % len(looks)]
        figure.add_scatter(
            x=rows["predicted"],
            y=rows["observed"],
            name=place.replace("<br>", ", "),
            mode="lines+markers",
            line_color=colour,
            marker={"symbol": symbol, "size": 8},
            customdata=rows["n_bin"],
            hovertemplate="predicted %{x:.2f}, observed %{y:.2f}, n = %{customdata}",
        )
    figure.update_xaxes(title="predicted error (mean of a tenth)", range=[0, 1])
    figure.update_yaxes(title="observed error", range=[0, 1])
    sizes = " and ".join(f"{n:,}" for n in sorted(set(df["n_test"])))
    caption = f"Best layer, final prompt token; tenths of {sizes} test examples"
    return style.finish(figure, "Predicted against observed error", caption, height=520)


def layer_by_position(df: pd.DataFrame) -> go.Figure:
    """Draw how well errors are read in every layer at every prompt token, a panel a place.

    Takes columns `place`, `layer`, `position` (0 is the final prompt token), `auroc`, `n_test`.
    """
    places = style.in_order(df, "place")
    figure, cells = grid_of(places)
    for place, cell in zip(places, cells, strict=True):
        wide = style.rows_where(df, place=place).pivot(
            index="layer", columns="position", values="auroc"
        )
        figure.add_heatmap(
            z=wide.to_numpy(),
            x=list(wide.columns),
            y=list(wide.index),
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            hovertemplate="layer %{y}, token %{x}: AUROC %{z:.3f}<extra></extra>",
            **cell,
        )
    figure.update_xaxes(title="token, counted from the final prompt token", showgrid=False)
    figure.update_yaxes(title="layer", dtick=1, showgrid=False)
    bar = {"title": "AUROC", "thickness": 14}
    scale = {"colorscale": "Cividis", "cmin": 0.5, "cmax": 1, "colorbar": bar}
    sizes = " and ".join(f"{n:,}" for n in sorted(set(df["n_test"])))
    return style.finish(
        figure,
        "Where in a prompt the error can be read",
        f"A ridge probe for each cell; AUROC on {sizes} test examples; .5 is chance",
        height=150 + 230 * -(-len(places) // 2),
        coloraxis=scale,
        meta={"min_width": 640},
    )


def transfer_matrix(df: pd.DataFrame) -> go.Figure:
    """Draw the AUROC of each task's probe on every task.

    Takes columns `fitted_on`, `measured_on`, `auroc` and `n_test`.
    """
    tasks = style.in_order(df, "fitted_on")
    wide = df.pivot(index="fitted_on", columns="measured_on", values="auroc").loc[tasks, tasks]
    heat = go.Heatmap(
        z=wide.to_numpy(),
        x=tasks,
        y=tasks,
        texttemplate="%{z:.2f}",
        textfont={"color": style.INK},
        colorscale=style.DIVERGING,
        zmin=0,
        zmax=1,
        xgap=2,
        ygap=2,
        showscale=False,
        hovertemplate="fitted on %{y}, measured on %{x}: AUROC %{z:.3f}<extra></extra>",
    )
    figure = go.Figure(heat)
    figure.update_xaxes(title="measured on", showgrid=False, ticks="", tickangle=-35)
    figure.update_yaxes(title="fitted on", autorange="reversed", showgrid=False, ticks="")
    caption = f"AUROC on {df['n_test'].iloc[0]:,} test examples a task; .5 is chance"
    meta = {"min_width": 200 + 58 * len(tasks)}
    height = 220 + 34 * len(tasks)
    return style.finish(
        figure, "Do probes read other tasks' errors?", caption, height=height, meta=meta
    )


def grid_of(names: list[str]) -> tuple[go.Figure, list[dict[str, int]]]:
    """Return a figure of two columns of panels with these titles, and the place of each."""
    n_rows, n_columns = -(-len(names) // 2), min(2, len(names))
    figure = make_subplots(
        rows=n_rows,
        cols=n_columns,
        horizontal_spacing=0.14,
        vertical_spacing=0.34 / n_rows,
        subplot_titles=[name.replace("<br>", ", ") for name in names],
    )
    places = [{"row": 1 + i // n_columns, "col": 1 + i % n_columns} for i in range(len(names))]
    return figure, places


if __name__ == "__main__":
    main()
