"""How every figure looks: one template, one colour and one symbol per method.

Hues are Okabe and Ito's, shifted to a middle lightness, so that marks stand out on white paper and
on a dark page alike, and remain apart for colour-blind readers; symbols tell methods of one family
apart. Figures stand on white paper; a report takes it away and puts its own colour of text.
"""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

BLUE, SKY, GREEN = "#0072B2", "#3A9BD9", "#009E73"
ORANGE, VERMILLION, PINK, GREY = "#C98500", "#D55E00", "#C46C9C", "#858585"

DIVERGING = ((0, "rgba(213,94,0,.6)"), (0.5, "rgba(128,128,128,.1)"), (1, "rgba(0,114,178,.6)"))
"""Orange is worse, blue is better, pale is no difference; the page shines through, so that text in
its own colour can be read on all of them, light or dark."""
INK = "#444444"
"""Of text; a page replaces it by its own."""

BOUND_COLOURS = {"unconditional": BLUE, "mcnemar": ORANGE, "betting": GREEN, "hoeffding": GREY}
CORRECT, INCORRECT = BLUE, VERMILLION
"""Of examples, wherever they are told apart."""
CHANGES = {
    "1->1": ("stays correct", "rgba(0,114,178,.4)"),
    "0->1": ("recovered", BLUE),
    "1->0": ("regressed", VERMILLION),
    "0->0": ("stays incorrect", "rgba(213,94,0,.4)"),
}
"""Blue ends correct, vermillion incorrect; full colours changed, pale ones did not."""

# One hue per family: grey and pink move nothing, orange fixed strength, blue MERA, green ours,
# vermillion and sky other families.
_METHODS = {
    "no_steering": (GREY, "circle"),
    "prompt_steering": (GREY, "diamond"),
    "flip": (PINK, "circle"),
    "class_probe": (PINK, "star"),
    "class_probe_steered": (PINK, "square"),
    "withhold": (PINK, "diamond"),
    "additive_probe": (ORANGE, "circle"),
    "additive_logistic_probe": (ORANGE, "diamond"),
    "additive_sub_probe": (ORANGE, "triangle-down"),
    "additive_median_probe": (ORANGE, "square"),
    "tuned_additive_probe": (ORANGE, "star"),
    "vanilla_contrastive": (VERMILLION, "circle"),
    "tuned_contrastive": (VERMILLION, "star"),
    "optimal_probe": (BLUE, "circle"),
    "sub_optimal_probe": (BLUE, "triangle-down"),
    "median_optimal_probe": (BLUE, "square"),
    "optimal_logistic_probe": (SKY, "diamond"),
    "optimal_contrastive": (SKY, "star"),
    "ridge_probe": (BLUE, "diamond"),
    "whitened": (VERMILLION, "diamond"),
    "affine": (VERMILLION, "square"),
    "rotation": (VERMILLION, "triangle-down"),
    "ablation": (VERMILLION, "cross"),
    "cast_gate": (ORANGE, "cross"),
    "learned_strength": (SKY, "square"),
    "lora": (GREY, "star"),
    "recommend": (INK, "star"),
    "pattern_probe": (GREEN, "triangle-down"),
    "controlled_pattern": (GREEN, "square"),
    "controlled_contrastive": (GREEN, "diamond"),
    "answer_controlled": (GREEN, "star"),
    "searched": (GREEN, "circle"),
    "instruction": (SKY, "hexagon"),
    "prompt_controlled": (GREEN, "hexagon"),
    "reply_contrast": (SKY, "pentagon"),
    "kind_controlled": (GREEN, "pentagon"),
    "retry": (PINK, "hexagon"),
    "best_of_k": (PINK, "pentagon"),
    "best_of_k_scorer": (GREY, "pentagon"),
}

_GRID, LINE = "rgba(128,128,128,.22)", "rgba(128,128,128,.6)"
_AXIS = {
    "gridcolor": _GRID,
    "linecolor": LINE,
    "zerolinecolor": LINE,
    "zerolinewidth": 1,
    "automargin": True,
    "title": {"standoff": 10},
    "ticks": "outside",
    "tickcolor": LINE,
}

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, -apple-system, Segoe UI, sans-serif", "color": INK},
        # Hung from the top edge in pixels: a share of the height would wander in tall figures.
        "title": {"x": 0.01, "y": 1, "yanchor": "top", "pad": {"t": 14}, "font": {"size": 18}},
        "paper_bgcolor": "#fff",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "colorway": [BLUE, ORANGE, GREEN, VERMILLION, SKY, PINK, GREY],
        # At the foot of the figure it can grow without reaching title, axis or marks.
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        "margin": {"l": 50, "r": 20, "t": 90, "b": 60},
        "height": 440,
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#858585", "activecolor": BLUE},
        "annotationdefaults": {"font": {"size": 14}},
        "bargap": 0.25,
        "hoverlabel": {"font": {"size": 13}},
    }
)


def mark(change: str) -> dict[str, Any]:
    """Return how examples of a change look: outlined in full, so that pale ones show on black."""
    edge = CORRECT if change.endswith("1") else INCORRECT
    return {"color": CHANGES[change][1], "line": {"color": edge, "width": 1}}


def colour_of(method: str) -> str:
    """Return the colour of a method, the same in every figure; grey for one without.

    What follows a comma is a variant and does not count.
    """
    return _look(method)[0]


def symbol_of(method: str) -> str:
    """Return the marker symbol of a method."""
    return _look(method)[1]


def _look(method: str) -> tuple[str, str]:
    return _METHODS.get(method.partition(",")[0], (GREY, "x"))


def finish(figure: go.Figure, title: str, caption: str = "", **layout: Any) -> go.Figure:
    """Put the template, the title and the line below it on a figure."""
    heading = {"text": title, "subtitle": {"text": caption, "font": {"size": 13}}}
    return figure.update_layout(template=TEMPLATE, title=heading, **layout)


_SHOWN = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)


def knob_axis(values: Any, knob: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Return where the numbers of a grid lie, and the x axis: logit for thresholds, else log."""
    v = np.asarray(values, dtype=float)
    if knob != "threshold":
        ticks = [float(value) for value in v]
        title, x, at = "strength (residual norms)", np.log(v), np.log(ticks)
    else:
        ticks = [t for t in _SHOWN if v.min() * 0.9 <= t <= min(v.max() * 1.1, 1)] or list(v)
        title, x, at = "threshold (predicted error)", _logit(v), _logit(np.array(ticks))
    text = [f"{tick:g}" for tick in ticks]
    return x, {"title": title, "tickvals": list(at), "ticktext": text, "zeroline": False}


def _logit(t: np.ndarray) -> np.ndarray:
    return np.log(t / (1 - t))


def rows_where(df: pd.DataFrame, **values: object) -> pd.DataFrame:
    """Return the rows in which every named column has the given value."""
    for column, value in values.items():
        df = pd.DataFrame(df[df[column] == value])
    return df


def in_order(df: pd.DataFrame, column: str) -> list[str]:
    """Return the distinct values of a column as they first come; methods in the fixed order."""
    values = list(dict.fromkeys(df[column]))
    known = list(_METHODS)
    if column != "method":
        return values
    place = {name: i for i, name in enumerate(known)}
    return sorted(values, key=lambda name: place.get(name.partition(",")[0], len(known)))
