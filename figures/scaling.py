"""What the stages of a run cost, measured on small models and extrapolated."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from figures import results, save
from mera_tl.plots import style

NAME = "scaling"


def main() -> None:
    save(stage_costs(results(NAME)), NAME)


STAGES = {"collect": style.BLUE, "fit": style.ORANGE, "calibrate": style.GREEN}


def stage_costs(df: pd.DataFrame) -> go.Figure:
    """Draw measured against modelled seconds, and the hours of a run at sizes never run.

    Takes the records of `experiments/scaling.py`. Open marks were left out of the fits, so they
    test them; bars are extrapolated from all marks.
    """
    names = ("measured: small models, one core", "extrapolated: a million prompts")
    figure = make_subplots(rows=1, cols=2, subplot_titles=names, horizontal_spacing=0.12)
    marks = style.rows_where(df, kind="measured")
    whole = style.rows_where(df, kind="whole run")
    seen = pd.concat([marks, whole])
    ends = [float(seen[["cpu_s", "predicted_s"]].to_numpy(dtype=float).min())]
    ends.append(float(seen[["cpu_s", "predicted_s"]].to_numpy(dtype=float).max()))
    line = {"color": style.GREY, "dash": "dash", "width": 1}
    figure.add_scatter(x=ends, y=ends, mode="lines", line=line, showlegend=False, row=1, col=1)
    for stage, colour in STAGES.items():
        rows = style.rows_where(marks, stage=stage)
        symbols = ["circle" if role == "fitted" else "circle-open" for role in rows["role"]]
        figure.add_scatter(
            x=rows["predicted_s"],
            y=rows["cpu_s"],
            name=stage,
            legendgroup=stage,
            mode="markers",
            marker={"color": colour, "symbol": symbols, "size": 9},
            row=1,
            col=1,
        )
    star = {"color": style.VERMILLION, "symbol": "star", "size": 13}
    figure.add_scatter(
        x=whole["predicted_s"], y=whole["cpu_s"], name="a whole run", mode="markers", marker=star
    )
    far = style.rows_where(df, kind="extrapolated")
    far = pd.DataFrame(far[far["prompts"] == far["prompts"].max()])
    bars = {stage: far[f"{stage}_core_h"] for stage in STAGES}
    for stage, hours in bars.items():
        look = {"marker_color": STAGES[stage], "legendgroup": stage, "showlegend": False}
        figure.add_bar(x=far["model"], y=hours, name=stage, **look, row=1, col=2)
    figure.add_bar(
        x=far["model"],
        y=far["passes_accelerator_h"],
        name="collect and calibrate, one accelerator (assumed)",
        marker_color=style.GREY,
        row=1,
        col=2,
    )
    log = {"type": "log", "dtick": 1, "exponentformat": "power"}
    figure.update_xaxes(title="modelled seconds", **log, row=1, col=1)
    figure.update_yaxes(title="measured seconds", **log, row=1, col=1)
    figure.update_yaxes(title="hours (of one core, or as said)", **log, row=1, col=2)
    caption = f"{len(marks)} timings; open marks were not fitted to; bars are extrapolations"
    return style.finish(figure, "What a run costs", caption, barmode="group")


if __name__ == "__main__":
    main()
